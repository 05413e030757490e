//! JSON of a caller's own making, taken strictly.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{
    Deserialize, Deserializer, Error as _, IntoDeserializer as _, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};

/// Free fields of the caller's. A name that occurs twice is refused, at any depth: two
/// readers could take two different values for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Free(pub(super) Map<String, Value>);

impl<'de> Deserialize<'de> for Free {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_map(Strict)? {
            Value::Object(fields) => Ok(Self(fields)),
            _ => Err(D::Error::custom("an object is wanted")),
        }
    }
}

/// One value, of which every object names each field once.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Strict).map(Self)
    }
}

struct Strict;

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut taken = Vec::new();
        while let Some(Once(item)) = items.next_element()? {
            taken.push(item);
        }
        Ok(Value::Array(taken))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut taken = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            if taken.contains_key(&name) {
                return Err(A::Error::custom(format_args!("duplicate field `{name}`")));
            }
            let Once(value) = fields.next_value()?;
            taken.insert(name, value);
        }
        Ok(Value::Object(taken))
    }
}

/// A message of named fields. serde's own code for structures also takes a list of their
/// values.
pub(super) fn object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_map(Named(PhantomData))
}

/// The same where it may be absent or null.
pub(super) fn object_or_none<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct OrNone<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for OrNone<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object, or null")
        }

        fn visit_none<E>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_unit<E>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, given: D) -> Result<Option<T>, D::Error> {
            object(given).map(Some)
        }
    }

    deserializer.deserialize_option(OrNone(PhantomData))
}

struct Named<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Named<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(fields))
    }
}

/// One of some words. serde's own code for enumerations also takes an object for it.
pub(super) fn word<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let word = String::deserialize(deserializer)?;
    T::deserialize(word.into_deserializer())
}

/// The same where it may be absent or null.
pub(super) fn word_or_none<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let word = Option::<String>::deserialize(deserializer)?;
    word.map(|word| T::deserialize(word.into_deserializer()))
        .transpose()
}

/// Texts by name, each name once.
pub(super) fn texts_or_none<'de, D>(
    deserializer: D,
) -> Result<Option<BTreeMap<String, String>>, D::Error>
where
    D: Deserializer<'de>,
{
    let Some(Free(fields)) = Option::deserialize(deserializer)? else {
        return Ok(None);
    };
    let texts = fields.into_iter().map(|(name, value)| match value {
        Value::String(text) => Ok((name, text)),
        _ => Err(D::Error::custom(format_args!("`{name}` must be a text"))),
    });
    texts.collect::<Result<_, _>>().map(Some)
}

/// Free fields as Remit keeps them: text by name. Texts stay as they are where they can't
/// be taken for anything else, every other value becomes its JSON.
pub(super) fn kept(fields: Free) -> impl Iterator<Item = (String, String)> {
    fields.0.into_iter().map(|(name, value)| {
        let text = match value {
            Value::String(text) if serde_json::from_str::<Value>(&text).is_err() => text,
            value => value.to_string(),
        };
        (name, text)
    })
}

/// The value that [`kept`] made a text of.
pub(super) fn given(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| text.into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_kept_comes_back_as_it_was_given() {
        let fields = json!({
            "plain": "text", "number": 5, "digits": "5", "flag": true, "word": "true",
            "quoted": "\"x\"", "nothing": null, "deep": {"a": [1, {"b": "c"}]}, "empty": "",
        });
        let text = fields.to_string();
        let taken: Free = serde_json::from_str(&text).expect("an object");
        let kept: Vec<_> = kept(taken).collect();
        assert!(kept.contains(&("plain".into(), "text".into())));
        let back: Map<_, _> = kept
            .into_iter()
            .map(|(name, text)| (name, given(&text)))
            .collect();
        assert_eq!(Value::Object(back), fields);
    }

    #[test]
    fn a_name_that_occurs_twice_is_refused_at_any_depth() {
        for text in [
            r#"{"a":1,"a":1}"#,
            r#"{"a":{"b":1,"b":2}}"#,
            r#"{"a":[{"b":1,"b":2}]}"#,
        ] {
            let refused = serde_json::from_str::<Free>(text).expect_err("twice");
            assert!(refused.to_string().contains("duplicate field"), "{refused}");
        }
        assert!(serde_json::from_str::<Free>(r#"{"a":{"b":1},"c":{"b":1}}"#).is_ok());
        assert!(serde_json::from_str::<Free>("[]").is_err());
    }
}
