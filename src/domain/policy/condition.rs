//! One rule's condition: compiled when it is provisioned, evaluated for each decision.
//!
//! An expression is bounded before it is parsed, checked before it is kept, and its cost
//! is counted before it is evaluated: nothing that a policy or an argument says can hold
//! up a lane, and what fails to evaluate is an error that the rule's effect decides about.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;

use cel::parser::{Expression, Parser};
use cel::{Context, ExecutionError, Value};
use regex::{Regex, RegexBuilder};

use super::check::{Checked, Checker, cut};

/// Longest expression: its length bounds the depth of the parser's stack.
const BYTES_MAX: usize = 1_024;
/// Deepest nesting of brackets, and longest run of signs.
const BRACKETS_MAX: usize = 32;
/// Largest compiled pattern.
const PATTERN_BYTES_MAX: usize = 64 * 1_024;
/// What one condition, and all of one decision, may cost: steps of a loop times the bytes
/// that each can look at.
const COST_MAX: u64 = 4 * 1_024 * 1_024;
pub(super) const COSTS_MAX: u64 = 4 * COST_MAX;
/// The least that a step of a loop counts as looking at.
const STEP_BYTES: u64 = 1_024;

/// Where in an expression: line and column, from 1.
pub(super) type Place = Option<(usize, usize)>;

/// A condition that is ready to be evaluated.
#[derive(Debug)]
pub(super) struct Condition {
    expression: Expression,
    checked: Checked,
    patterns: Vec<(String, Regex)>,
}

/// How large the arguments are, for what a loop over them can cost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Size {
    /// Bytes of the arguments.
    pub(super) bytes: usize,
    /// The most elements of one list or map that a condition can loop over.
    pub(super) widest: usize,
}

impl Condition {
    /// Compiles an expression, or says where its first mistake is.
    pub(super) fn compile(text: &str) -> Result<Self, (Place, String)> {
        bounded(text)?;
        let place = |start: u32| place_of(text, usize::try_from(start).unwrap_or(usize::MAX));
        let parsed = std::panic::catch_unwind(|| {
            Parser::default()
                .max_recursion_depth(64)
                .parse_with_source_info(text)
        });
        let (expression, source) = match parsed {
            Ok(Ok(parsed)) => parsed,
            Ok(Err(errors)) => {
                let first = errors.errors.first();
                let at = first.and_then(|error| {
                    let line = usize::try_from(error.pos.0).ok().filter(|line| *line > 0)?;
                    Some((line, usize::try_from(error.pos.1).ok()?.max(1)))
                });
                let said = first.map_or("can't be read", |error| error.msg.as_str());
                return Err((at, said.chars().take(200).collect()));
            }
            Err(_) => return Err((None, "can't be read".to_owned())),
        };
        let checked = Checker::check(&expression).map_err(|(id, text)| {
            let at = source.offset_for(id).and_then(|(start, _)| place(start));
            (at, text)
        })?;
        let mut patterns = Vec::new();
        for pattern in &checked.patterns {
            let compiled = RegexBuilder::new(pattern)
                .size_limit(PATTERN_BYTES_MAX)
                .dfa_size_limit(PATTERN_BYTES_MAX)
                .nest_limit(32)
                .build()
                .map_err(|error| {
                    let at = text
                        .find(pattern.as_str())
                        .and_then(|at| place_of(text, at));
                    let said: String = error.to_string().chars().take(200).collect();
                    (
                        at,
                        format!("the pattern {} is refused: {said}", cut(pattern)),
                    )
                })?;
            patterns.push((pattern.clone(), compiled));
        }
        Ok(Self {
            expression,
            checked,
            patterns,
        })
    }

    /// Whether it reads a variable.
    pub(super) fn reads(&self, variable: &str) -> bool {
        self.checked.reads.contains(&variable)
    }

    pub(super) fn reads_activity(&self) -> bool {
        self.reads("recent")
    }

    /// Patterns that it matches against.
    pub(super) fn patterns(&self) -> impl Iterator<Item = (&str, &Regex)> {
        self.patterns
            .iter()
            .map(|(text, regex)| (text.as_str(), regex))
    }

    /// What it always says, where it reads nothing.
    pub(super) fn constant(&self) -> Option<bool> {
        if !self.checked.reads.is_empty() {
            return None;
        }
        let context = context(self.patterns());
        self.evaluate(&context).ok()
    }

    /// What evaluating it can cost at the most.
    pub(super) fn cost(&self, size: Size) -> u64 {
        let widest = size.widest.max(self.checked.longest_list).max(1);
        let widest = u64::try_from(widest).unwrap_or(u64::MAX);
        let steps = self
            .checked
            .loops
            .iter()
            .map(|depth| widest.saturating_pow(*depth));
        let steps = steps.fold(0, u64::saturating_add);
        let bytes = u64::try_from(size.bytes)
            .unwrap_or(u64::MAX)
            .max(STEP_BYTES);
        steps.saturating_mul(bytes)
    }

    /// Whether it holds, or why that can't be told. `left` is what the decision may still
    /// cost.
    pub(super) fn holds(
        &self,
        context: &Context,
        size: Size,
        left: &mut u64,
    ) -> Result<bool, String> {
        let cost = self.cost(size);
        if cost > COST_MAX || cost > *left {
            return Err("the arguments are too large for it to be evaluated".to_owned());
        }
        *left -= cost;
        self.evaluate(context)
    }

    fn evaluate(&self, context: &Context) -> Result<bool, String> {
        let evaluated = std::panic::catch_unwind(AssertUnwindSafe(|| {
            Value::resolve(&self.expression, context)
        }));
        match evaluated {
            Ok(Ok(Value::Bool(holds))) => Ok(holds),
            Ok(Ok(other)) => Err(format!("it is a {}, not true or false", other.type_of())),
            Ok(Err(error)) => Err(worded(&error)),
            Err(_) => Err("it can't be evaluated".to_owned()),
        }
    }
}

/// A context in which patterns are compiled already.
pub(super) fn context<'p, 'v, 'a>(
    patterns: impl Iterator<Item = (&'a str, &'a Regex)>,
) -> Context<'p, 'v> {
    let patterns: HashMap<String, Regex> = patterns
        .map(|(text, regex)| (text.to_owned(), regex.clone()))
        .collect();
    let mut context = Context::with_env(environment());
    if !patterns.is_empty() {
        let matches =
            move |cel::extractors::This(text): cel::extractors::This<std::sync::Arc<String>>,
                  pattern: std::sync::Arc<String>|
                  -> Result<bool, ExecutionError> {
                let regex = patterns.get(pattern.as_str());
                let unknown = || ExecutionError::function_error("matches", "unknown pattern");
                regex.map(|regex| regex.is_match(&text)).ok_or_else(unknown)
            };
        // The name is free: the library's own function is left out with its feature. Were
        // it not, conditions with patterns would fail, which is closed.
        let _ = context.add_function("matches", matches);
    }
    context
}

/// The standard functions, once for the process.
fn environment() -> std::sync::Arc<cel::Env> {
    static ENVIRONMENT: std::sync::LazyLock<std::sync::Arc<cel::Env>> =
        std::sync::LazyLock::new(|| std::sync::Arc::new(cel::Env::stdlib()));
    ENVIRONMENT.clone()
}

/// An error in words that are short, whatever values it carries.
fn worded(error: &ExecutionError) -> String {
    match error {
        ExecutionError::NoSuchKey(key) => {
            format!("there is no {}: ask has(...) first", cut(key))
        }
        ExecutionError::Overflow(..) => "a number is too large".to_owned(),
        ExecutionError::DivisionByZero(_) | ExecutionError::RemainderByZero(_) => {
            "a division by zero".to_owned()
        }
        ExecutionError::NoSuchOverload(overload) => {
            overload.to_string().chars().take(200).collect()
        }
        ExecutionError::ValuesNotComparable(..)
        | ExecutionError::UnsupportedBinaryOperator(..)
        | ExecutionError::UnexpectedType { .. } => "an argument has another type".to_owned(),
        _ => "it can't be evaluated on these arguments".to_owned(),
    }
}

/// Refuses what the parser's stack might not bear.
fn bounded(text: &str) -> Result<(), (Place, String)> {
    if text.len() > BYTES_MAX {
        let text = format!(
            "{} bytes: at most {BYTES_MAX}; make two rules of it",
            text.len()
        );
        return Err((None, text));
    }
    let (mut open, mut signs) = (0_usize, 0_usize);
    for (at, character) in text.chars().enumerate() {
        match character {
            '(' | '[' | '{' => open += 1,
            ')' | ']' | '}' => open = open.saturating_sub(1),
            _ => {}
        }
        signs = match character {
            '!' | '-' => signs + 1,
            character if character.is_whitespace() => signs,
            _ => 0,
        };
        if open > BRACKETS_MAX || signs > BRACKETS_MAX {
            let said = format!("nested deeper than {BRACKETS_MAX}: make two rules of it");
            return Err((place_of(text, at), said));
        }
    }
    Ok(())
}

/// Line and column of a character, both from 1.
fn place_of(text: &str, at: usize) -> Place {
    let before: Vec<char> = text.chars().take(at).collect();
    let line = before.iter().filter(|c| **c == '\n').count() + 1;
    let column = before.iter().rev().take_while(|c| **c != '\n').count() + 1;
    Some((line, column))
}
