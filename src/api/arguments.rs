//! An action's arguments: their hash, and what policy reads of them.
//!
//! The hash is over their canonical form (`docs/ledger.md`): compact JSON, keys sorted by
//! their bytes, whole numbers up to 2⁵³ without a fraction, other numbers in
//! their shortest form.

use pbjson_types::value::Kind;
use pbjson_types::{Struct, Value};
use serde_json::Value as Json;

use crate::domain::id::Malformed;
use crate::domain::request::{Arguments, Digest};

/// Longest canonical form.
const BYTES_MAX: usize = 64 * 1_024;
/// Deepest nesting.
const DEPTH_MAX: usize = 32;

/// Hashes arguments and takes them apart; refuses what is too long, too deep or no
/// number.
pub fn parse(arguments: Struct) -> Result<(Digest, Arguments), Malformed> {
    let mut text = String::new();
    write_struct(&mut text, &arguments, 1)?;
    let mut widest = 0;
    let parsed = Arguments {
        value: object(arguments, &mut widest),
        bytes: text.len(),
        widest,
    };
    Ok((Digest::of(text.as_bytes()), parsed))
}

fn object(arguments: Struct, widest: &mut usize) -> Json {
    *widest = arguments.fields.len().max(*widest);
    let fields = arguments.fields.into_iter();
    Json::Object(
        fields
            .map(|(key, value)| (key, json(value, widest)))
            .collect(),
    )
}

/// The same value as JSON, in which whole numbers are whole.
fn json(value: Value, widest: &mut usize) -> Json {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(value)) => Json::Bool(value),
        Some(Kind::NumberValue(value)) => match whole(value) {
            Some(whole) => whole.into(),
            None => serde_json::Number::from_f64(value).map_or(Json::Null, Json::Number),
        },
        Some(Kind::StringValue(value)) => Json::String(value),
        Some(Kind::StructValue(value)) => object(value, widest),
        Some(Kind::ListValue(list)) => {
            *widest = list.values.len().max(*widest);
            Json::Array(
                list.values
                    .into_iter()
                    .map(|value| json(value, widest))
                    .collect(),
            )
        }
    }
}

fn write_struct(text: &mut String, fields: &Struct, depth: usize) -> Result<(), Malformed> {
    bounded(text, depth)?;
    let mut sorted: Vec<_> = fields.fields.iter().collect();
    sorted.sort_by_key(|(key, _)| key.as_bytes());
    text.push('{');
    for (at, (key, value)) in sorted.into_iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        write_string(text, key)?;
        text.push(':');
        write_value(text, value, depth + 1)?;
    }
    text.push('}');
    bounded(text, depth)
}

fn write_value(text: &mut String, value: &Value, depth: usize) -> Result<(), Malformed> {
    bounded(text, depth)?;
    match &value.kind {
        None | Some(Kind::NullValue(_)) => text.push_str("null"),
        Some(Kind::BoolValue(value)) => text.push_str(if *value { "true" } else { "false" }),
        Some(Kind::NumberValue(value)) => write_number(text, *value)?,
        Some(Kind::StringValue(value)) => write_string(text, value)?,
        Some(Kind::StructValue(value)) => write_struct(text, value, depth)?,
        Some(Kind::ListValue(list)) => {
            text.push('[');
            for (at, value) in list.values.iter().enumerate() {
                if at > 0 {
                    text.push(',');
                }
                write_value(text, value, depth + 1)?;
            }
            text.push(']');
        }
    }
    bounded(text, depth)
}

fn write_number(text: &mut String, value: f64) -> Result<(), Malformed> {
    if !value.is_finite() {
        return Err(Malformed::new("made of finite numbers"));
    }
    match whole(value) {
        Some(whole) => text.push_str(&whole.to_string()),
        None => text.push_str(&value.to_string()),
    }
    Ok(())
}

/// A number that is whole, and within 2⁵³.
fn whole(value: f64) -> Option<i64> {
    /// Up to here every whole number is a double of its own.
    const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;

    // The cast loses nothing; −0 becomes 0.
    #[allow(clippy::cast_possible_truncation)]
    (value.fract() == 0.0 && value.abs() <= WHOLE_MAX).then_some(value as i64)
}

fn write_string(text: &mut String, value: &str) -> Result<(), Malformed> {
    let quoted = serde_json::to_string(value).map_err(|_| Malformed::new("valid text"))?;
    text.push_str(&quoted);
    Ok(())
}

fn bounded(text: &str, depth: usize) -> Result<(), Malformed> {
    if text.len() > BYTES_MAX {
        return Err(Malformed::new("at most 64 KiB as JSON"));
    }
    if depth > DEPTH_MAX {
        return Err(Malformed::new("at most 32 levels deep"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(json: &str) -> Struct {
        serde_json::from_str(json).expect("an object")
    }

    fn digest(arguments: &Struct) -> Result<Digest, Malformed> {
        parse(arguments.clone()).map(|(digest, _)| digest)
    }

    #[test]
    fn whole_numbers_are_whole_and_the_widest_list_is_known() {
        let given = r#"{"amount": 100.0, "share": 0.5, "to": ["a", "b", {"c": [1, 2, 3, 4]}]}"#;
        let (_, parsed) = parse(arguments(given)).expect("arguments");
        assert_eq!(parsed.value["amount"].as_i64(), Some(100));
        assert_eq!(parsed.value["share"].as_f64(), Some(0.5));
        assert_eq!(parsed.widest, 4);
        assert_eq!(parsed, Arguments::of(parsed.value.clone()));
    }

    #[test]
    fn neither_order_nor_spelling_of_numbers_matters() {
        let one = digest(&arguments(r#"{"b": 1.0, "a": [true, null, "x"]}"#));
        let other = digest(&arguments(r#"{"a":[true,null,"x"],"b":1}"#));
        assert_eq!(one, other);
        assert_eq!(
            one.expect("a digest"),
            Digest::of(br#"{"a":[true,null,"x"],"b":1}"#)
        );
        assert_ne!(other, digest(&arguments(r#"{"a":[true,null,"x"],"b":2}"#)));
    }

    #[test]
    fn too_deep_too_long_and_infinite_are_refused() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(40), "]".repeat(40));
        assert!(digest(&arguments(&deep)).is_err());
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(70_000));
        assert!(digest(&arguments(&long)).is_err());
        let mut infinite = arguments("{}");
        let value = Value {
            kind: Some(Kind::NumberValue(f64::INFINITY)),
        };
        infinite.fields.insert("a".into(), value);
        assert!(digest(&infinite).is_err());
    }
}
