//! What the commands share that call a server.

use anyhow::Context as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

use crate::config::{ApiKeyText, ClientConfig, Target};

/// Adds a key to every request.
#[derive(Debug, Clone)]
pub(crate) struct Bearer(MetadataValue<Ascii>);

impl Bearer {
    pub(crate) fn new(key: &ApiKeyText) -> anyhow::Result<Self> {
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", key.expose())
            .parse()
            .context("the API key is no header value")?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// A connection to a server.
pub(crate) async fn connect(client: &ClientConfig) -> anyhow::Result<Channel> {
    let channel = match &client.target {
        Target::Unix(path) => {
            let path = path.clone();
            // The address is only a name here: the connector goes to the socket.
            Endpoint::from_static("http://localhost")
                .connect_with_connector(tower::service_fn(move |_| {
                    let path = path.clone();
                    async move {
                        let stream = tokio::net::UnixStream::connect(path).await?;
                        Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
                    }
                }))
                .await
        }
        Target::Tcp(uri) => {
            let mut endpoint = Endpoint::from(uri.clone()).tcp_nodelay(true);
            if client.target.is_tls() {
                let mut tls = ClientTlsConfig::new().with_enabled_roots();
                if let Some(path) = &client.ca_cert {
                    let pem = std::fs::read(path)
                        .with_context(|| format!("reading {}", path.display()))?;
                    tls = tls.ca_certificate(Certificate::from_pem(pem));
                }
                endpoint = endpoint.tls_config(tls)?;
            }
            endpoint.connect().await
        }
    };
    channel.context("connecting to the server: is it running, and is --target right?")
}

/// An RPC's error as a command reports it.
#[expect(
    clippy::needless_pass_by_value,
    reason = "handed to `map_err` as it is"
)]
pub(crate) fn failed(status: Status) -> anyhow::Error {
    match violations(&status) {
        Some(violations) => anyhow::anyhow!("{:?}:\n{violations}", status.code()),
        None => anyhow::anyhow!("{:?}: {}", status.code(), status.message()),
    }
}

/// Every bad field that an error names, each on a line of its own.
pub(crate) fn violations(status: &Status) -> Option<String> {
    use tonic_types::StatusExt as _;

    let details = status.get_error_details();
    let fields = &details.bad_request()?.field_violations;
    let mut lines: Vec<_> = fields
        .iter()
        .map(|violation| format!("  {}: {}", violation.field, violation.description))
        .collect();
    let metadata = details.error_info().map(|info| &info.metadata);
    if let Some(more) = metadata.and_then(|metadata| metadata.get("violations_not_named")) {
        lines.push(format!("  and {more} more"));
    }
    Some(lines.join("\n"))
}
