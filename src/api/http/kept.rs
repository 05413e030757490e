//! What the protocol knows and Remit does not, in the metadata of records: tags, keys and
//! dimensions as they were given, beside what is the caller's own.

use std::collections::{BTreeMap, HashMap};

use super::problem::Fault;
use super::strict::{Free, kept};
use crate::api::fields::{MAP_BYTES_MAX, MAP_KEY_MAX, MAP_MAX, VALUE_MAX};

/// Names of the metadata under which is kept what Remit does not know: tags, ...
pub(super) const TAGS: &str = "cycles.tags";
/// ... the idempotency key as text, ...
pub(super) const KEY: &str = "cycles.idempotency_key";
/// ... dimensions as they were given, where a scope can't say them; what is too long for one
/// value goes on under `cycles.dimensions.1` and so on, ...
const DIMENSIONS: &str = "cycles.dimensions";
/// ... and how many fields did not fit into a record of what has happened already.
const LEFT_OUT: &str = "cycles.left_out";
/// What names of the caller's own may not begin with.
const RESERVED: &str = "cycles.";
/// Places for these names: dimensions have two, enough for the protocol's longest in ASCII.
const KEPT_MAX: usize = 4;
/// Most names of the caller's own.
const METADATA_MAX: usize = MAP_MAX - KEPT_MAX;

/// Dimensions as they were given, where the subject does not say them.
#[derive(Debug, Default)]
pub(super) struct Given(pub(super) Option<String>);

impl Given {
    /// Keeps them in a record's metadata, as far as there is room: they are only given back
    /// from it, so that nothing is refused for them.
    pub(super) fn keep(self, metadata: &mut HashMap<String, String>) {
        let text = self.0.unwrap_or_default();
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.floor_char_boundary(VALUE_MAX));
            parts.push((dimensions_part(parts.len()), part.to_owned()));
            rest = after;
        }
        let of = |(name, part): (&String, &String)| name.len() + part.len();
        let bytes: usize = metadata.iter().map(of).sum();
        let more: usize = parts.iter().map(|(name, part)| of((name, part))).sum();
        if metadata.len() + parts.len() <= MAP_MAX && bytes + more <= MAP_BYTES_MAX {
            metadata.extend(parts);
        }
    }

    /// What [`Self::keep`] kept, taken out again.
    pub(super) fn take(metadata: &mut HashMap<String, String>) -> Option<BTreeMap<String, String>> {
        let parts = (0..).map_while(|part| metadata.remove(&dimensions_part(part)));
        serde_json::from_str(&parts.collect::<String>()).ok()
    }
}

fn dimensions_part(part: usize) -> String {
    match part {
        0 => DIMENSIONS.to_owned(),
        part => format!("{DIMENSIONS}.{part}"),
    }
}

/// The caller's metadata.
pub(super) fn metadata(given: Option<Free>) -> Result<HashMap<String, String>, Fault> {
    let metadata: HashMap<_, _> = kept(given.unwrap_or_default()).collect();
    if metadata.len() > METADATA_MAX {
        let wants = format!("at most {METADATA_MAX} entries");
        return Err(Fault::field("metadata", &wants));
    }
    match metadata.keys().find(|name| name.starts_with(RESERVED)) {
        Some(name) => Err(Fault::field(
            &format!("metadata.{name}"),
            "named otherwise: `cycles.` is reserved",
        )),
        None => Ok(metadata),
    }
}

/// What becomes of the idempotency key in the metadata of a reservation, from where
/// [`reservation`] answers it.
pub(super) fn kept_key(key: &str) -> (String, String) {
    (KEY.to_owned(), key.to_owned())
}

/// The caller's metadata on what has happened already: it must not fail for what only goes
/// into the record, so that what does not fit is left out, and counted.
pub(super) fn record_metadata(given: Option<Free>) -> HashMap<String, String> {
    let mut bytes = LEFT_OUT.len() + VALUE_MAX;
    let mut fitting = HashMap::new();
    let mut left_out = 0_u32;
    for (name, value) in kept(given.unwrap_or_default()) {
        let fits = !name.is_empty()
            && name.len() <= MAP_KEY_MAX
            && value.len() <= VALUE_MAX
            && fitting.len() < METADATA_MAX
            && bytes + name.len() + value.len() <= MAP_BYTES_MAX
            && !name.contains('\0')
            && !value.contains('\0')
            && !name.starts_with(RESERVED);
        if fits {
            bytes += name.len() + value.len();
            fitting.insert(name, value);
        } else {
            left_out += 1;
        }
    }
    if left_out > 0 {
        fitting.insert(LEFT_OUT.to_owned(), left_out.to_string());
    }
    fitting
}
