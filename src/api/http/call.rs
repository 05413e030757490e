//! One call: who makes it, what it carries, and how it is answered.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};

use super::Gateway;
use super::problem::Fault;
use super::strict::object;
use crate::api::auth::Caller;
use crate::api::layers::{Deadline, RequestIdentity};
use crate::domain::permission::Permission;

const API_KEY: HeaderName = HeaderName::from_static("x-cycles-api-key");
const ADMIN_KEY: HeaderName = HeaderName::from_static("x-admin-api-key");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("x-idempotency-key");
const DECISION_ID: HeaderName = HeaderName::from_static("x-remit-decision-id");
const SEQUENCE: HeaderName = HeaderName::from_static("x-remit-ledger-sequence");
const REPLAYED: HeaderName = HeaderName::from_static("x-remit-replayed");

/// What a call's answer says of its caller, once that is known.
#[derive(Debug, Clone, Default)]
pub(super) struct Told(pub(super) Arc<OnceLock<String>>);

/// The head of a call.
#[derive(Debug)]
pub(super) struct Call {
    headers: HeaderMap,
    identity: RequestIdentity,
    deadline: Option<Deadline>,
    told: Told,
}

impl<S: Sync> FromRequestParts<S> for Call {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let extensions = &parts.extensions;
        let identity = extensions.get::<RequestIdentity>().cloned();
        Ok(Self {
            headers: parts.headers.clone(),
            identity: identity.unwrap_or_else(RequestIdentity::generate),
            deadline: extensions.get::<Deadline>().copied(),
            told: extensions.get::<Told>().cloned().unwrap_or_default(),
        })
    }
}

/// A caller who was let in, and in whose name the services are asked.
pub(super) struct Asker {
    pub(super) caller: Caller,
    authorization: MetadataValue<Ascii>,
    identity: RequestIdentity,
    deadline: Option<Deadline>,
}

impl Asker {
    /// A request to a service.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let authorization = self.authorization.clone();
        request
            .metadata_mut()
            .insert("authorization", authorization);
        request.extensions_mut().insert(self.identity.clone());
        if let Some(deadline) = self.deadline {
            request.extensions_mut().insert(deadline);
        }
        request
    }

    /// Refuses a key that lacks a permission.
    pub(super) fn must_hold(&self, permission: Permission) -> Result<(), Fault> {
        Ok(self.caller.must_hold(permission)?)
    }

    /// The tenant of the key as people write it; empty for an operator's.
    pub(super) fn tenant(&self) -> &str {
        self.caller.tenant().map_or("", |tenant| tenant.as_str())
    }
}

impl Gateway {
    /// Lets in an agent, by `X-Cycles-API-Key`. On the runtime plane it is a tenant's.
    pub(super) async fn agent(&self, call: &Call, needs: Permission) -> Result<Asker, Fault> {
        let asker = self.admit(call, API_KEY).await?;
        asker.must_hold(needs)?;
        Ok(asker)
    }

    /// Lets in an operator, by `X-Admin-API-Key` and nothing else.
    pub(super) async fn operator(&self, call: &Call, needs: Permission) -> Result<Asker, Fault> {
        let asker = self.admit(call, ADMIN_KEY).await?;
        asker.must_hold(needs)?;
        Ok(asker)
    }

    /// Lets in an operator by `X-Admin-API-Key`, else an agent.
    pub(super) async fn either(&self, call: &Call, needs: Permission) -> Result<Asker, Fault> {
        let asker = self.anyone(call).await?;
        asker.must_hold(needs)?;
        Ok(asker)
    }

    /// Whoever has a key, whatever that may do. A bad `X-Admin-API-Key` is not saved by a
    /// good `X-Cycles-API-Key`.
    pub(super) async fn anyone(&self, call: &Call) -> Result<Asker, Fault> {
        let key = call.headers.get(ADMIN_KEY);
        // A blank one counts as missing.
        let named = key.is_some_and(|key| !key.as_bytes().trim_ascii().is_empty());
        let header = if named { ADMIN_KEY } else { API_KEY };
        self.admit(call, header).await
    }

    async fn admit(&self, call: &Call, header: HeaderName) -> Result<Asker, Fault> {
        let unauthorized = |message| Fault::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message);
        let operates = header == ADMIN_KEY;
        let mut keys = call.headers.get_all(&header).iter();
        let key = keys.next();
        // Which of them would a proxy in front have meant?
        if keys.next().is_some() {
            return Err(unauthorized("more than one API key"));
        }
        let key = key.and_then(|key| key.to_str().ok()).map(str::trim);
        let key = key.filter(|key| !key.is_empty()).ok_or_else(|| {
            unauthorized(match operates {
                true => "Missing X-Admin-API-Key",
                false => "Missing API key",
            })
        })?;
        let authorization = format!("Bearer {key}")
            .parse()
            .map_err(|_| unauthorized("the API key is not valid"))?;
        let mut request = Request::new(());
        let metadata = request.metadata_mut();
        metadata.insert("authorization", MetadataValue::clone(&authorization));
        request.extensions_mut().insert(call.identity.clone());
        let caller = Caller::known(self.services.engine(), &request).await?;
        // Each header takes its own kind of key: an agent's call is about its key's tenant, and
        // what a tenant's key may do is far from all that an operator may.
        match caller.tenant() {
            None if !operates => {
                return Err(unauthorized(
                    "the API key is an operator's, of no tenant: use a key of the tenant",
                ));
            }
            Some(_) if operates => {
                return Err(unauthorized(
                    "Invalid admin API key: a tenant's key goes into X-Cycles-API-Key",
                ));
            }
            // Set once: a call has one caller.
            Some(tenant) => drop(call.told.0.set(tenant.as_str().to_owned())),
            None => {}
        }
        Ok(Asker {
            caller,
            authorization,
            identity: call.identity.clone(),
            deadline: call.deadline,
        })
    }

    /// The body of a call, as JSON of a certain form.
    pub(super) async fn json<T: DeserializeOwned>(
        &self,
        call: &Call,
        body: Body,
    ) -> Result<T, Fault> {
        let kind = call.headers.get(header::CONTENT_TYPE);
        let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or("");
        let media = kind.split(';').next().unwrap_or("").trim();
        if !media.eq_ignore_ascii_case("application/json") {
            return Err(Fault::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "INVALID_REQUEST",
                "Content-Type must be application/json",
            ));
        }
        let most = self.max_body_bytes;
        let too_large = || {
            Fault::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "INVALID_REQUEST",
                format!("the body must be at most {most} bytes"),
            )
        };
        // Before any of it is waited for.
        let announced = call.headers.get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: usize| length > most) {
            return Err(too_large());
        }
        let body = Limited::new(body, most).collect().await;
        let body = body.map_err(|error| match error.is::<LengthLimitError>() {
            true => too_large(),
            false => Fault::invalid("Malformed request body: it did not come whole"),
        })?;
        let body = body.to_bytes();
        let mut json = serde_json::Deserializer::from_slice(&body);
        let malformed = |at: &str, error: serde_json::Error| {
            let at = if at == "." { "" } else { at };
            let colon = if at.is_empty() { "" } else { ": " };
            Fault::invalid(format!("Malformed request body: {at}{colon}{error}"))
        };
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
        let taken = object(tracked).map_err(|error| malformed(&track.path().to_string(), error))?;
        json.end().map_err(|error| malformed("", error))?;
        Ok(taken)
    }
}

impl Call {
    /// Refuses a header that names another idempotency key than the body.
    pub(super) fn must_agree(&self, key: &str) -> Result<(), Fault> {
        let mut headers = self.headers.get_all(IDEMPOTENCY_KEY).iter();
        match headers.all(|header| header.as_bytes() == key.as_bytes()) {
            true => Ok(()),
            false => Err(Fault::invalid(
                "X-Idempotency-Key must be the idempotency_key of the body, or absent",
            )),
        }
    }

    /// The idempotency key of a call whose body may name none: then the header's.
    pub(super) fn key_or(
        &self,
        key: Option<String>,
        fresh: impl FnOnce() -> String,
    ) -> Result<String, Fault> {
        if let Some(key) = key {
            self.must_agree(&key)?;
            return Ok(key);
        }
        let mut headers = self.headers.get_all(IDEMPOTENCY_KEY).iter();
        let only = match (headers.next(), headers.next()) {
            (None, _) => return Ok(fresh()),
            (Some(header), None) => header.to_str().ok(),
            (Some(_), Some(_)) => None,
        };
        // One that is left aside would let a retry take effect twice.
        let only = only.filter(|key| (1..=256).contains(&key.len()));
        only.map(str::to_owned)
            .ok_or_else(|| Fault::field("X-Idempotency-Key", "one, of 1 to 256 ASCII characters"))
    }
}

/// A success. What the protocol does not know stands in headers.
#[derive(Debug)]
pub(super) struct Answer {
    status: StatusCode,
    body: Vec<u8>,
    decision_id: String,
    sequence: i64,
    replayed: bool,
}

impl Answer {
    /// 200
    pub(super) fn new(body: &impl Serialize) -> Result<Self, Fault> {
        let body = serde_json::to_vec(body).map_err(|error| {
            tracing::error!(%error, "an answer could not be written");
            Fault::internal()
        })?;
        Ok(Self {
            status: StatusCode::OK,
            body,
            decision_id: String::new(),
            sequence: 0,
            replayed: false,
        })
    }

    /// 201
    pub(super) fn created(body: &impl Serialize) -> Result<Self, Fault> {
        Ok(Self {
            status: StatusCode::CREATED,
            ..Self::new(body)?
        })
    }

    /// Names the decision.
    pub(super) fn decided(self, decision_id: String) -> Self {
        Self {
            decision_id,
            ..self
        }
    }

    /// Names the ledger's entry.
    pub(super) fn recorded(self, sequence: i64, replayed: bool) -> Self {
        Self {
            sequence,
            replayed,
            ..self
        }
    }
}

/// The headers that name a decision.
pub(super) fn record_headers(
    headers: &mut HeaderMap,
    decision_id: &str,
    sequence: i64,
    replayed: bool,
) {
    if let (false, Ok(id)) = (decision_id.is_empty(), HeaderValue::from_str(decision_id)) {
        headers.insert(DECISION_ID, id);
    }
    if sequence > 0 {
        headers.insert(SEQUENCE, sequence.into());
    }
    if replayed {
        headers.insert(REPLAYED, HeaderValue::from_static("true"));
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let kind = [(header::CONTENT_TYPE, "application/json")];
        let mut response = (self.status, kind, self.body).into_response();
        let headers = response.headers_mut();
        record_headers(headers, &self.decision_id, self.sequence, self.replayed);
        response
    }
}
