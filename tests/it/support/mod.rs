//! Starts what the tests talk to.

// Each test module uses its own part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use remit::proto::approvals_client::ApprovalsClient;
use remit::proto::authority_client::AuthorityClient;
use remit::proto::events_client::EventsClient;
use remit::proto::ledger_client::LedgerClient;
use remit::proto::provisioning_client::ProvisioningClient;
use remit::proto::*;
use remit::store::embedded::{Embedded, EmbeddedOptions};
use sqlx::Connection as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

/// Adds the key to every request.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        Ok(request)
    }
}

type Transport = InterceptedService<Channel, Bearer>;

/// The services under one key.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) authority: AuthorityClient<Transport>,
    pub(crate) provisioning: ProvisioningClient<Transport>,
    pub(crate) ledger: LedgerClient<Transport>,
    pub(crate) approvals: ApprovalsClient<Transport>,
    pub(crate) events: EventsClient<Transport>,
}

impl Client {
    pub(crate) fn new(address: &str, key: &str) -> Self {
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .expect("an address")
            .connect_lazy();
        let bearer =
            Bearer((!key.is_empty()).then(|| format!("Bearer {key}").parse().expect("a header")));
        Self {
            authority: AuthorityClient::with_interceptor(channel.clone(), bearer.clone()),
            provisioning: ProvisioningClient::with_interceptor(channel.clone(), bearer.clone()),
            ledger: LedgerClient::with_interceptor(channel.clone(), bearer.clone()),
            approvals: ApprovalsClient::with_interceptor(channel.clone(), bearer.clone()),
            events: EventsClient::with_interceptor(channel, bearer),
        }
    }
}

/// A key that no other request has.
pub(crate) fn unique(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A PostgreSQL for one test, with its data in a folder of its own.
pub(crate) struct Database {
    pub(crate) embedded: Embedded,
    pub(crate) folder: tempfile::TempDir,
}

impl Database {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("remit-it")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o711))
            .tempdir()
            .expect("a folder");
        let embedded = Embedded::start(EmbeddedOptions {
            data_dir: folder.path().join("data"),
            postgres_bin: None,
        })
        .await
        .expect("PostgreSQL starts");
        Self { embedded, folder }
    }

    pub(crate) fn url(&self) -> String {
        self.embedded.owner_url()
    }

    pub(crate) fn key_file(&self) -> PathBuf {
        self.folder.path().join("operator.key")
    }

    /// As the database's superuser.
    pub(crate) async fn sql(&self, statement: &'static str) {
        let mut conn = sqlx::PgConnection::connect(&self.url())
            .await
            .expect("a connection");
        sqlx::raw_sql(statement)
            .execute(&mut conn)
            .await
            .expect("the statement runs");
    }

    pub(crate) async fn count(&self, query: &'static str) -> i64 {
        let mut conn = sqlx::PgConnection::connect(&self.url())
            .await
            .expect("a connection");
        sqlx::query_scalar(query)
            .fetch_one(&mut conn)
            .await
            .expect("a count")
    }

    /// The process id of the PostgreSQL server, while one accepts connections.
    pub(crate) fn postmaster(&self) -> Option<i32> {
        let file = self.folder.path().join("data/pg/postmaster.pid");
        let text = std::fs::read_to_string(file).ok()?;
        let ready = text.lines().nth(7)?.trim() == "ready";
        let pid: i32 = text.lines().next()?.trim().parse().ok()?;
        let alive = Path::new(&format!("/proc/{pid}")).exists();
        (ready && alive).then_some(pid)
    }

    pub(crate) fn verify(&self) -> Output {
        remit(&["verify", "--database-url", &self.url()])
    }

    /// Chain and balances agree, as `remit verify` sees it.
    pub(crate) fn assert_intact(&self) {
        let output = self.verify();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
    }
}

pub(crate) fn remit(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_remit"))
        .args(args)
        .output()
        .expect("remit runs")
}

/// A server process on somebody's database.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: String,
    pub(crate) key: String,
    /// Where the Cycles protocol is served.
    pub(crate) cycles: String,
    /// Where its admin plane is.
    pub(crate) cycles_admin: String,
    port_file: PathBuf,
}

impl Server {
    pub(crate) async fn start(database: &Database) -> Self {
        Self::start_with(database, &[]).await
    }

    pub(crate) async fn start_with(database: &Database, more: &[&str]) -> Self {
        Self::start_at(database, &database.url(), more).await
    }

    /// On a way of its own to the database.
    pub(crate) async fn start_at(database: &Database, url: &str, more: &[&str]) -> Self {
        let port_file = database.folder.path().join(unique("address"));
        let file = |kind: &str| database.folder.path().join(unique(kind));
        let (cycles, cycles_admin) = (file("cycles"), file("cycles-admin"));
        let key_file = database.key_file();
        let child = Command::new(env!("CARGO_BIN_EXE_remit"))
            .args(["serve", "--listen", "127.0.0.1:0", "--log", "warn"])
            .arg("--port-file")
            .arg(&port_file)
            .args(["--cycles-listen", "127.0.0.1:0", "--cycles-port-file"])
            .arg(&cycles)
            .args([
                "--cycles-admin-listen",
                "127.0.0.1:0",
                "--cycles-admin-port-file",
            ])
            .arg(&cycles_admin)
            .arg("--bootstrap-key-file")
            .arg(&key_file)
            .arg("--database-url")
            .arg(url)
            .args(more)
            .stderr(Stdio::null())
            .spawn()
            .expect("remit starts");
        let address = wait_for(&port_file).await;
        let key = std::fs::read_to_string(key_file).expect("the operator's key");
        Self {
            child,
            address,
            key: key.trim().to_owned(),
            cycles: wait_for(&cycles).await,
            cycles_admin: wait_for(&cycles_admin).await,
            port_file,
        }
    }

    /// Speaks with the operator's key.
    pub(crate) fn operator(&self) -> Client {
        Client::new(&self.address, &self.key)
    }

    pub(crate) fn client(&self, key: &str) -> Client {
        Client::new(&self.address, key)
    }

    /// As `kill -9` does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("a process to kill");
        self.child.wait().expect("an end");
    }

    /// Starts the same again, on the port that is free then.
    pub(crate) async fn restart(&mut self, database: &Database) {
        let fresh = Self::start(database).await;
        *self = fresh;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ended already is as good as killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.port_file);
    }
}

async fn wait_for(file: &Path) -> String {
    let begun = Instant::now();
    loop {
        if let Ok(address) = std::fs::read_to_string(file)
            && !address.is_empty()
        {
            return address;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "no server");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A server on a database of its own, with a tenant that has some budgets.
pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) database: Database,
    pub(crate) operator: Client,
}

impl World {
    pub(crate) async fn start() -> Self {
        let database = Database::start().await;
        let server = Server::start(&database).await;
        let operator = server.operator();
        Self {
            server,
            database,
            operator,
        }
    }

    pub(crate) async fn with_budgets(budgets: Vec<Budget>) -> Self {
        let world = Self::start().await;
        world.provision("acme", budgets).await;
        world
    }

    pub(crate) async fn provision(&self, tenant: &str, budgets: Vec<Budget>) -> ProvisionResponse {
        let request = ProvisionRequest {
            idempotency_key: unique("provision"),
            tenants: vec![Tenant {
                tenant: tenant.into(),
                ..Tenant::default()
            }],
            budgets,
            ..ProvisionRequest::default()
        };
        let answer = self.operator.clone().provisioning.provision(request).await;
        answer.expect("a plan").into_inner()
    }

    /// A key of a tenant with these permissions.
    pub(crate) async fn key(
        &self,
        tenant: &str,
        permissions: &[Permission],
        prefix: &str,
    ) -> String {
        let request = CreateApiKeyRequest {
            idempotency_key: unique("key"),
            api_key: Some(ApiKey {
                tenant: tenant.into(),
                permissions: permissions.iter().map(|p| (*p).into()).collect(),
                subject_prefix: prefix.into(),
                ..ApiKey::default()
            }),
        };
        let mut provisioning = self.operator.clone().provisioning;
        let created = provisioning.create_api_key(request).await;
        created.expect("a key").into_inner().secret
    }
}

pub(crate) fn budget(scope: &str, unit: Unit, allocation: i64) -> Budget {
    Budget {
        scope: scope.into(),
        unit: unit.into(),
        limit: Some(remit::proto::budget::Limit::Allocation(allocation)),
        ..Budget::default()
    }
}

pub(crate) fn subject(tenant: &str) -> Subject {
    Subject {
        tenant: tenant.into(),
        ..Subject::default()
    }
}

pub(crate) fn points(value: i64) -> Vec<Amount> {
    vec![Amount {
        unit: Unit::RiskPoints.into(),
        value,
    }]
}

/// A Reserve of some risk points for tenant acme.
pub(crate) fn reserve(value: i64) -> ReserveRequest {
    ReserveRequest {
        idempotency_key: unique("reserve"),
        subject: Some(subject("acme")),
        action: Some(Action {
            name: "act".into(),
            ..Action::default()
        }),
        estimates: points(value),
        ..ReserveRequest::default()
    }
}

pub(crate) fn commit(reservation: &str, actual: Vec<Amount>) -> CommitRequest {
    CommitRequest {
        idempotency_key: unique("commit"),
        reservation_id: reservation.into(),
        actual,
        tenant: "acme".into(),
        ..CommitRequest::default()
    }
}

pub(crate) fn release(reservation: &str) -> ReleaseRequest {
    ReleaseRequest {
        idempotency_key: unique("release"),
        reservation_id: reservation.into(),
        tenant: "acme".into(),
        ..ReleaseRequest::default()
    }
}

/// The code of the first reason, or ALLOW.
pub(crate) fn verdict(answer: &ReserveResponse) -> String {
    match answer.reasons.first() {
        Some(reason) => reason.code.clone(),
        None => answer.decision().as_str_name().replace("DECISION_", ""),
    }
}

/// `google.rpc.ErrorInfo.reason`, after checking that it is one of ours.
pub(crate) fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().expect("an ErrorInfo");
    assert_eq!(info.domain, "remit");
    info.reason.clone()
}
