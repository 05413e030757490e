//! Gives the errors that tonic makes by itself the form of ours. An error that has
//! details already is left alone: it was made by us.
//!
//! tonic tells its errors apart only by their text, so the texts stand here; a test
//! with a real server notices when a new version words them differently.

use std::collections::HashMap;

use http::HeaderMap;
use tonic::{Code, Status};
use tonic_types::ErrorDetails;

use super::{INTERNAL_TEXT, code_name, refusal};

const TOO_LARGE: &str = "Error, decoded message length too large";
const TOO_LARGE_INFLATED: &str = "Error decompressing: size limit";
const UNKNOWN_COMPRESSION: &str = "Content is compressed with";

/// `INTERNAL` for tonic, as the gRPC documents ask for, but the sender's fault.
const MALFORMED: [&str; 5] = [
    "failed to decode Protobuf message",
    "Missing request message",
    "Unexpected EOF decoding stream",
    "protocol error: received message with",
    "Error decompressing",
];

/// Shapes an error that stands in headers or trailers.
pub(super) fn reshape(headers: &mut HeaderMap) {
    if headers.contains_key(Status::GRPC_STATUS_DETAILS) {
        return;
    }
    let Some(status) = Status::from_header_map(headers) else {
        return;
    };
    if status.code() == Code::Ok {
        return;
    }
    let ours = worded(&status);
    headers.remove(Status::GRPC_MESSAGE);
    if let Err(status) = ours.add_header(headers) {
        tracing::error!(%status, "an error's details can't be sent");
    }
}

fn worded(status: &Status) -> Status {
    let text = status.message();
    let with = |code, reason: &str, message: &str, metadata| {
        refusal(code, reason, message, metadata, ErrorDetails::new())
    };
    match status.code() {
        Code::OutOfRange if text.starts_with(TOO_LARGE) => {
            too_large(text, &["bytes", "limit_bytes"])
        }
        Code::ResourceExhausted if text.starts_with(TOO_LARGE_INFLATED) => {
            too_large(text, &["limit_bytes"])
        }
        Code::Internal if MALFORMED.iter().any(|start| text.starts_with(start)) => with(
            Code::InvalidArgument,
            "MALFORMED_MESSAGE",
            text,
            HashMap::new(),
        ),
        Code::Internal => {
            tracing::error!(cause = text, "internal error");
            with(Code::Internal, "INTERNAL", INTERNAL_TEXT, HashMap::new())
        }
        Code::Unimplemented if text.starts_with(UNKNOWN_COMPRESSION) => with(
            Code::Unimplemented,
            "COMPRESSION_NOT_SUPPORTED",
            text,
            HashMap::new(),
        ),
        Code::Unimplemented if text.is_empty() => with(
            Code::Unimplemented,
            "METHOD_NOT_FOUND",
            "the server has no such method",
            HashMap::new(),
        ),
        code => with(code, code_name(code), text, HashMap::new()),
    }
}

/// `names` says what the numbers in tonic's text mean, in their order there.
fn too_large(text: &str, names: &[&str]) -> Status {
    let numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty());
    let metadata: HashMap<String, String> = names
        .iter()
        .map(|name| (*name).to_owned())
        .zip(numbers.map(str::to_owned))
        .collect();
    let message = match metadata.get("limit_bytes") {
        Some(limit) => format!("the request message is larger than {limit} bytes, the limit here"),
        None => "the request message is larger than the limit here".to_owned(),
    };
    refusal(
        Code::ResourceExhausted,
        "MESSAGE_TOO_LARGE",
        &message,
        metadata,
        ErrorDetails::new(),
    )
}
