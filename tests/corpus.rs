//! The fuzzer's corpus, and conditions made of pieces at random: none of them panics,
//! goes on without end, or is told in more words than an answer can hold.

use proptest::prelude::*;

#[path = "../fuzz/exercise.rs"]
mod exercise;

use exercise::{Became, exercise};

#[test]
fn every_input_of_the_corpus_ends_well() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/policy");
    let mut seen = [0; 3];
    for file in std::fs::read_dir(folder).expect("the corpus") {
        let path = file.expect("a file").path();
        let bytes = std::fs::read(&path).expect("an input");
        let Ok(text) = String::from_utf8(bytes) else {
            continue;
        };
        // On a small stack: a server's tasks have 2 MiB in release builds.
        let task = move || exercise(&text);
        let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(task);
        let became = thread.expect("a thread").join();
        seen[match became.unwrap_or_else(|_| panic!("{}", path.display())) {
            Became::Refused => 0,
            Became::Evaluated(_) => 1,
            Became::Failed => 2,
        }] += 1;
    }
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

/// Pieces of conditions, whole and broken.
fn piece() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "args",
        ".a",
        ".b",
        "['a']",
        "[0]",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        " && ",
        " || ",
        "!",
        "-",
        " + ",
        " * ",
        " / ",
        " % ",
        " == ",
        " != ",
        " < ",
        " >= ",
        " in ",
        " ? ",
        " : ",
        "1",
        "0",
        "9223372036854775807",
        "1.5e308",
        "'x'",
        "\"\\u202e\"",
        "true",
        "null",
        "size(",
        ".exists(x, ",
        ".all(x, ",
        ".map(x, ",
        ".filter(x, ",
        "has(",
        "x",
        "action.tier",
        "amounts.TOKENS",
        "remaining.RISK_POINTS",
        "budgets",
        "dimensions",
        "recent.denials",
        ".matches('^(a|b)*$')",
        ".contains('a')",
        "int(",
        "string(",
        "double(",
        "@result",
        "b''",
        "1u",
        "//",
        "\n",
        "`a`",
        ".?",
        "\\",
        "\u{0}",
        "\u{1F600}",
    ])
}

/// Arguments of any shape.
fn arguments() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::Value;
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
            prop::collection::btree_map("[ab]", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn conditions_made_of_pieces_are_refused_or_evaluated(
        pieces in prop::collection::vec(piece(), 1..24),
        a in arguments(),
        b in arguments(),
    ) {
        let arguments = serde_json::json!({"a": a, "b": b});
        exercise(&format!("{}\n---\n{arguments}", pieces.concat()));
    }

    #[test]
    fn sound_conditions_hold_on_arguments_of_any_shape(
        a in arguments(),
        b in arguments(),
        condition in prop::sample::select(vec![
            "args.a == args.b",
            "args.a > args.b",
            "args.a + args.b == args.a",
            "args.a in args.b",
            "args.a.exists(x, args.b.exists(y, x == y))",
            "args.a.all(x, x > 0)",
            "args.a.map(x, [x]).size() > 2",
            "args.a.filter(x, has(x.a)).size() == 0",
            "size(args.a) / size(args.b) > 1",
            "string(args.a) == string(args.b)",
            "int(args.a) % 7 == 1",
            "args.a[args.b] == 1",
            "args.a.a.a.a.a == 1",
            "args.a.matches('^(x+)+$') || args.b.contains('a')",
            "args.a ? args.b : true",
        ]),
    ) {
        let arguments = serde_json::json!({"a": a, "b": b});
        let became = exercise(&format!("{condition}\n---\n{arguments}"));
        prop_assert_ne!(became, Became::Refused);
    }
}
