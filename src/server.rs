//! The composition root: builds the parts from a configuration, serves until told
//! to stop, and stops in order.
//!
//! Stop: health NOT_SERVING → (a delay for balancers) → long-lived answers end, no
//! new connections, requests in work are finished → lanes drained → embedded
//! PostgreSQL stopped. All of it is bounded.

use std::future::{Future, IntoFuture as _};
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::api::grpc::{Services, random_key};
use crate::api::http::{Gateway, Listening, tls};
use crate::api::layers::{EdgeLayer, LayerLimits, RequestIdentity, stack};
use crate::api::monitoring;
use crate::config::{Database, Limits, ServeConfig, TlsFiles};
use crate::domain::key::{KeyText, NewKey};
use crate::domain::permission::Permissions;
use crate::domain::request::Origin;
use crate::engine::{self, Call, Engine};
use crate::metrics::Metrics;
use crate::proto;
use crate::proto::approvals_server::ApprovalsServer;
use crate::proto::authority_server::AuthorityServer;
use crate::proto::events_server::EventsServer;
use crate::proto::ledger_server::LedgerServer;
use crate::proto::provisioning_server::ProvisioningServer;
use crate::store::embedded::{Embedded, EmbeddedOptions, default_data_dir};
use crate::store::{SCHEMA_VERSION, Store, migrate, schema_version};
use crate::webhooks::{self, Reach};

/// Connections for reads outside the lanes.
const POOL: u32 = 8;
/// How often the database is asked whether it is there.
const PROBE: Duration = Duration::from_secs(1);
/// Names of the services, as health reports them.
const SERVICES: [&str; 6] = [
    "",
    "remit.v1.Authority",
    "remit.v1.Approvals",
    "remit.v1.Events",
    "remit.v1.Provisioning",
    "remit.v1.Ledger",
];

/// Where the operator's key is kept by default.
pub fn operator_key_path(data_dir: &Path) -> PathBuf {
    data_dir.join("operator.key")
}

/// The database that a configuration names: its URLs, and the server that was
/// started for it.
#[derive(Debug)]
pub struct Opened {
    /// For migrations.
    pub owner_url: String,
    /// For serving.
    pub service_url: String,
    /// The role that migrations give rights to.
    service_role: Option<&'static str>,
    embedded: Option<Embedded>,
    data_dir: Option<PathBuf>,
}

impl Opened {
    /// Starts the embedded server where no other is named.
    pub async fn open(database: &Database) -> anyhow::Result<Self> {
        match database {
            Database::Url(url) => Ok(Self {
                owner_url: url.expose().to_owned(),
                service_url: url.expose().to_owned(),
                service_role: None,
                embedded: None,
                data_dir: None,
            }),
            Database::Embedded {
                data_dir,
                postgres_bin,
            } => {
                let data_dir = data_dir.clone().unwrap_or_else(default_data_dir);
                let embedded = Embedded::start(EmbeddedOptions {
                    data_dir: data_dir.clone(),
                    postgres_bin: postgres_bin.clone(),
                })
                .await?;
                Ok(Self {
                    owner_url: embedded.owner_url(),
                    service_url: embedded.service_url(),
                    service_role: Some("remit_service"),
                    embedded: Some(embedded),
                    data_dir: Some(data_dir),
                })
            }
        }
    }

    /// Brings the schema to what this program needs.
    pub async fn migrate(&self) -> anyhow::Result<Vec<i32>> {
        let store = Store::new(&self.owner_url, 1)?;
        let mut conn = store.connect().await?;
        let now = jiff::Timestamp::now().as_microsecond();
        Ok(migrate(&mut conn, self.service_role, now).await?)
    }

    /// Refuses a schema that is not what this program needs.
    async fn check_schema(&self) -> anyhow::Result<()> {
        let store = Store::new(&self.service_url, 1)?;
        let mut conn = store.connect().await?;
        let found = schema_version(&mut conn).await?;
        if found != SCHEMA_VERSION {
            bail!(
                "the database's schema has version {found}, this program needs {SCHEMA_VERSION}: run `remit migrate`"
            );
        }
        Ok(())
    }

    /// Stops what was started.
    pub async fn close(self) -> anyhow::Result<()> {
        if let Some(embedded) = self.embedded {
            embedded.stop().await?;
        }
        Ok(())
    }
}

/// Serves until `shutdown` is done, then stops in order.
pub async fn serve(config: ServeConfig, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let opened = Opened::open(&config.database).await?;
    let served = serve_on(&config, &opened, shutdown).await;
    let closed = opened.close().await;
    served.and(closed)
}

async fn serve_on(
    config: &ServeConfig,
    opened: &Opened,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    if config.migrate {
        let applied = opened.migrate().await.context("migrating the database")?;
        if !applied.is_empty() {
            tracing::info!(versions = ?applied, "schema migrated");
        }
    } else {
        opened.check_schema().await?;
    }
    let store = Store::new(&opened.service_url, POOL)?;
    let limits = engine::Limits {
        lanes: config.engine.lanes,
        max_batch: config.engine.max_batch,
        max_waiting: config.engine.max_waiting,
        max_waiting_per_tenant: config.engine.max_waiting_per_tenant,
        sweep_interval: config.engine.sweep_interval,
    };
    let metrics = Metrics::new();
    let engine = Engine::start(store.clone(), limits, metrics.clone());
    let telling = tokio::spawn(webhooks::run(store, reach(config), engine.stopping()));
    let served = listen(config, opened, &engine, metrics, shutdown).await;
    engine.stop().await;
    // Sends nothing more by now, or will again after a restart.
    let _ = telling.await;
    served
}

fn reach(config: &ServeConfig) -> Reach {
    Reach {
        private: config.webhooks_allow_private,
    }
}

async fn listen(
    config: &ServeConfig,
    opened: &Opened,
    engine: &Engine,
    metrics: Metrics,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let default_key = opened.data_dir.as_deref().map(operator_key_path);
    let key_file = config.bootstrap_key_file.clone().or(default_key);
    bootstrap(engine, key_file.as_deref()).await?;

    let (reporter, health) = tonic_health::server::health_reporter();
    report(&reporter, ServingStatus::NotServing).await;
    let services = Services::new(engine.clone(), reach(config));
    let routes = routes(config, services.clone(), health)?;
    let limits = LayerLimits {
        max_concurrent_requests: config.limits.max_concurrent_requests,
        default_deadline: config.limits.default_deadline,
        max_deadline: config.limits.max_deadline,
    };
    let layer = stack(&limits, metrics.clone());
    let stop = CancellationToken::new();
    let mut servers = tokio::task::JoinSet::new();
    let (ready, readiness) = watch::channel(false);
    let gateway = Gateway {
        services,
        metrics: metrics.clone(),
        slots: layer.slots(),
        deadline: config.limits.default_deadline,
        max_body_bytes: config.limits.max_message_bytes,
        ready: readiness.clone(),
        is_admin: false,
    };
    for (flag, address, file, routes) in [
        (
            "--cycles-listen",
            config.cycles_listen,
            &config.cycles_port_file,
            gateway.clone().runtime(),
        ),
        (
            "--cycles-admin-listen",
            config.cycles_admin_listen,
            &config.cycles_admin_port_file,
            gateway.admin(),
        ),
    ] {
        let Some(address) = address else { continue };
        let listening = Listening::bind(address)
            .await
            .with_context(|| format!("{flag} (`none` switches it off)"))?;
        let bound = listening.address();
        let acceptor = config.tls.as_ref().map(tls).transpose()?;
        tracing::info!(address = %bound, tls = acceptor.is_some(), "serving Cycles");
        let serving = listening.serve(routes, acceptor, stop.clone());
        servers.spawn(async move {
            serving.await;
            Ok(())
        });
        announce(file.as_deref(), bound)?;
    }
    if let Some(address) = config.listen {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on {address}"))?;
        let bound = listener.local_addr()?;
        let mut server = builder(&config.limits, layer.clone());
        if let Some(tls) = &config.tls {
            server = server.tls_config(tls_config(tls)?)?;
        }
        let stopped = stop.clone().cancelled_owned();
        // Else each answer waits up to 40 ms for the client's delayed ACK. The
        // builder's own setting does not reach a listener that is handed in.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let router = server.add_routes(routes.clone());
        servers.spawn(router.serve_with_incoming_shutdown(incoming, stopped));
        tracing::info!(address = %bound, tls = config.tls.is_some(), "serving");
        announce(config.port_file.as_deref(), bound)?;
    }
    if let Some(path) = &config.socket {
        let listener = bind_socket(path).await?;
        let stopped = stop.clone().cancelled_owned();
        let incoming = UnixListenerStream::new(listener);
        let router = builder(&config.limits, layer.clone()).add_routes(routes.clone());
        servers.spawn(router.serve_with_incoming_shutdown(incoming, stopped));
        tracing::info!(socket = %path.display(), "serving");
    }

    if let Some(address) = config.metrics_listen {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on {address}"))?;
        let bound = listener.local_addr()?;
        tracing::info!(address = %bound, "metrics");
        let monitoring = axum::serve(listener, monitoring::router(metrics, readiness));
        let stopped = stop.clone().cancelled_owned();
        // Ends with the last probe; nobody waits for it.
        tokio::spawn(monitoring.with_graceful_shutdown(stopped).into_future());
        announce(config.metrics_port_file.as_deref(), bound)?;
    }
    let watched = tokio::spawn(watch_database(engine.clone(), reporter.clone(), ready));
    tokio::select! {
        () = shutdown => tracing::info!("stopping"),
        Some(ended) = servers.join_next() => {
            ended.context("a listener ended")?.context("a listener ended")?;
        }
    }
    watched.abort();
    report(&reporter, ServingStatus::NotServing).await;
    tokio::time::sleep(config.drain.delay).await;
    engine.begin_stop();
    stop.cancel();
    let drained = async { while servers.join_next().await.is_some() {} };
    if tokio::time::timeout(config.drain.timeout, drained)
        .await
        .is_err()
    {
        tracing::warn!("requests in work were cut off at the end of the drain time");
        servers.abort_all();
    }
    if let Some(path) = &config.socket {
        // Gone already is as good as removed.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

fn builder(
    limits: &Limits,
    layer: EdgeLayer,
) -> Server<tower::layer::util::Stack<EdgeLayer, tower::layer::util::Identity>> {
    Server::builder()
        .max_concurrent_streams(limits.max_streams_per_connection)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .layer(layer)
}

fn routes(
    config: &ServeConfig,
    services: Services,
    health: tonic_health::pb::health_server::HealthServer<
        impl tonic_health::pb::health_server::Health,
    >,
) -> anyhow::Result<Routes> {
    let message = config.limits.max_message_bytes;
    let mut routes = Routes::new(health)
        .add_service(AuthorityServer::new(services.clone()).max_decoding_message_size(message))
        .add_service(
            ProvisioningServer::new(services.clone())
                .max_decoding_message_size(config.limits.max_provision_bytes),
        )
        .add_service(ApprovalsServer::new(services.clone()).max_decoding_message_size(message))
        .add_service(EventsServer::new(services.clone()).max_decoding_message_size(message))
        .add_service(LedgerServer::new(services).max_decoding_message_size(message));
    if config.reflection {
        let described = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        routes = routes
            .add_service(described().build_v1()?)
            .add_service(described().build_v1alpha()?);
    }
    Ok(routes)
}

fn tls_config(files: &TlsFiles) -> anyhow::Result<ServerTlsConfig> {
    let read =
        |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let identity = Identity::from_pem(read(&files.cert)?, read(&files.key)?);
    let mut tls = ServerTlsConfig::new().identity(identity);
    if let Some(ca) = &files.client_ca {
        tls = tls.client_ca_root(Certificate::from_pem(read(ca)?));
    }
    Ok(tls)
}

fn announce(file: Option<&Path>, bound: SocketAddr) -> anyhow::Result<()> {
    if let Some(path) = file {
        // By a rename, so that a reader never sees half of it.
        let half = path.with_extension("new");
        std::fs::write(&half, bound.to_string())
            .and_then(|()| std::fs::rename(&half, path))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Takes a socket's path; a file that nobody answers on is a dead server's.
async fn bind_socket(path: &Path) -> anyhow::Result<UnixListener> {
    if path.exists() {
        if UnixStream::connect(path).await.is_ok() {
            bail!("{} is in use by another server", path.display());
        }
        std::fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

async fn report(reporter: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}

/// Keeps health in step with the database.
async fn watch_database(engine: Engine, reporter: HealthReporter, ready: watch::Sender<bool>) {
    let mut was = None;
    loop {
        let checked = tokio::time::timeout(PROBE * 2, engine.check()).await;
        let is = match &checked {
            Ok(Ok(())) => ServingStatus::Serving,
            Ok(Err(_)) | Err(_) => ServingStatus::NotServing,
        };
        if was != Some(is) {
            match (&checked, is) {
                (_, ServingStatus::Serving) => tracing::info!("ready"),
                (Ok(Err(error)), _) => tracing::warn!(%error, "not ready"),
                _ => tracing::warn!("not ready: the database does not answer"),
            }
            ready.send_replace(is == ServingStatus::Serving);
            report(&reporter, is).await;
            was = Some(is);
        }
        tokio::time::sleep(PROBE).await;
    }
}

/// Sees to it that there is an operator's key: the one in the file, or a new one
/// that is written there, or, without a file, printed once.
async fn bootstrap(engine: &Engine, file: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = file else {
        let system = crate::domain::id::TenantId::system();
        if engine.keys(&system, None, 1).await?.is_empty() {
            let key = random_key().map_err(|status| anyhow::anyhow!("{}", status.message()))?;
            register(engine, &key).await?;
            println!("operator key, shown this once: {}", key.expose());
        }
        return Ok(());
    };
    let key = match std::fs::read_to_string(path) {
        Ok(text) => KeyText::parse(text.trim())
            .map_err(|error| anyhow::anyhow!("{} must hold {error}", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = random_key().map_err(|status| anyhow::anyhow!("{}", status.message()))?;
            write_secret(path, &key.expose())
                .with_context(|| format!("writing {}", path.display()))?;
            tracing::info!(file = %path.display(), "operator key written");
            key
        }
        Err(error) => {
            return Err(error).with_context(|| format!("reading {}", path.display()));
        }
    };
    if engine.find_key(key.id()).await?.is_none() {
        register(engine, &key).await?;
    }
    Ok(())
}

fn write_secret(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    writeln!(file, "{text}")?;
    file.sync_all()
}

async fn register(engine: &Engine, key: &KeyText) -> anyhow::Result<()> {
    let identity = RequestIdentity::generate();
    let call = Call {
        origin: Origin {
            key: None,
            confinement: None,
            request_id: identity.request_id,
            trace_id: identity.trace_id,
        },
        deadline: None,
    };
    let new = NewKey {
        id: key.id().clone(),
        tenant: None,
        display_name: "first operator".into(),
        permissions: Permissions::all(),
        subject_prefix: None,
        approver_groups: Vec::new(),
        secret_sha256: key.secret_sha256(),
        expires_at: None,
    };
    // Another server may be starting on the same database with the same file.
    if let Err(error) = engine.create_key(&new, None, &call).await
        && engine.find_key(key.id()).await?.is_none()
    {
        return Err(error.into());
    }
    Ok(())
}
