//! The static check of a condition: names, types and cost, before it is ever evaluated.

use cel::common::ast::operators as op;
use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, LiteralValue};

/// Deepest nesting of an expression: evaluation goes down it on the stack.
const DEPTH_MAX: usize = 48;
/// Most `+`, each of which can copy a text.
const ADDITIONS_MAX: usize = 16;
/// Deepest nesting of `all`, `exists`, `exists_one`, `map` and `filter`.
const LOOPS_MAX: usize = 2;

/// A field of a record.
type Field = (&'static str, Scalar);

/// The type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scalar {
    /// Text.
    String,
    /// A 64-bit integer.
    Int,
}

/// The type of an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Type {
    /// Known only when it is evaluated: what arguments hold.
    Dyn,
    /// True or false.
    Bool,
    /// A 64-bit integer.
    Int,
    /// A floating-point number.
    Double,
    /// Text.
    String,
    /// Nothing.
    Null,
    /// Values of one type.
    List(Box<Type>),
    /// Values of one type by text.
    Map(Box<Type>),
    /// Named fields.
    Record(&'static [Field]),
}

const ACTION: &[Field] = &[
    ("name", Scalar::String),
    ("kind", Scalar::String),
    ("level", Scalar::String),
    ("tier", Scalar::Int),
    ("toolset", Scalar::String),
];
const SUBJECT: &[Field] = &[
    ("tenant", Scalar::String),
    ("workspace", Scalar::String),
    ("app", Scalar::String),
    ("workflow", Scalar::String),
    ("agent", Scalar::String),
    ("toolset", Scalar::String),
];
const UNITS: &[Field] = &[
    ("RISK_POINTS", Scalar::Int),
    ("USD_MICROCENTS", Scalar::Int),
    ("TOKENS", Scalar::Int),
    ("CREDITS", Scalar::Int),
    ("CALLS", Scalar::Int),
];
const BUDGET: &[Field] = &[
    ("scope", Scalar::String),
    ("budget_scope", Scalar::String),
    ("unit", Scalar::String),
    ("period", Scalar::String),
    ("remaining", Scalar::Int),
    ("utilization", Scalar::Int),
];
const RECENT: &[Field] = &[("actions", Scalar::Int), ("denials", Scalar::Int)];

/// The variables that a condition can read, with what they are.
pub const VARIABLES: [(&str, &str); 12] = [
    ("action", "name, kind, level, toolset: string; tier: int"),
    ("args", "the arguments, as given: any"),
    (
        "subject",
        "tenant, workspace, app, workflow, agent, toolset: string",
    ),
    ("dimensions", "map of string by key"),
    ("actor", "string"),
    ("environment", "string"),
    ("reason", "string"),
    ("amounts", "by unit, for example amounts.RISK_POINTS: int"),
    ("remaining", "by unit, the least of all budgets: int"),
    ("utilization", "by unit, the highest in basis points: int"),
    (
        "budgets",
        "list of scope, budget_scope, unit, period: string; remaining, utilization: int",
    ),
    ("recent", "actions, denials: int"),
];

/// The functions that a condition can call, beside operators.
pub const FUNCTIONS: &str = "size, contains, startsWith, endsWith, matches, has, all, exists, \
     exists_one, filter, map, int, double, string, bool";

fn variable(name: &str) -> Option<Type> {
    Some(match name {
        "action" => Type::Record(ACTION),
        "args" => Type::Map(Type::Dyn.into()),
        "subject" => Type::Record(SUBJECT),
        "dimensions" => Type::Map(Type::String.into()),
        "actor" | "environment" | "reason" => Type::String,
        "amounts" | "remaining" | "utilization" => Type::Record(UNITS),
        "budgets" => Type::List(Type::Record(BUDGET).into()),
        "recent" => Type::Record(RECENT),
        _ => return None,
    })
}

impl From<Scalar> for Type {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::String => Self::String,
            Scalar::Int => Self::Int,
        }
    }
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dyn => "any",
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Double => "double",
            Self::String => "string",
            Self::Null => "null",
            Self::List(_) => "list",
            Self::Map(_) => "map",
            Self::Record(_) => "record",
        })
    }
}

impl Type {
    fn is_number(&self) -> bool {
        matches!(self, Self::Int | Self::Double)
    }

    /// Whether values of both can be equal.
    fn agrees(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dyn, _) | (_, Self::Dyn) => true,
            (Self::List(own), Self::List(other)) | (Self::Map(own), Self::Map(other)) => {
                own.agrees(other)
            }
            (own, other) => own == other || (own.is_number() && other.is_number()),
        }
    }
}

/// What was found out about an expression.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Checked {
    /// Variables that it reads.
    pub(super) reads: Vec<&'static str>,
    /// Patterns that it matches against.
    pub(super) patterns: Vec<String>,
    /// For each loop how deep it stands; one that builds a list counts one deeper.
    pub(super) loops: Vec<u32>,
    /// The longest list that stands in it.
    pub(super) longest_list: usize,
}

/// A mistake, and the node that it is in.
pub(super) type Mistake = (u64, String);

pub(super) struct Checker {
    found: Checked,
    locals: Vec<(String, Type)>,
    depth: usize,
    loops: usize,
    additions: usize,
}

impl Checker {
    /// Checks a whole condition: it must say yes or no.
    pub(super) fn check(expr: &IdedExpr) -> Result<Checked, Mistake> {
        let mut checker = Self {
            found: Checked::default(),
            locals: Vec::new(),
            depth: 0,
            loops: 0,
            additions: 0,
        };
        match checker.infer(expr)? {
            Type::Bool | Type::Dyn => Ok(checker.found),
            other => Err((expr.id, format!("must be true or false; this is a {other}"))),
        }
    }

    fn infer(&mut self, expr: &IdedExpr) -> Result<Type, Mistake> {
        if self.depth >= DEPTH_MAX {
            return Err((
                expr.id,
                format!("nested deeper than {DEPTH_MAX}: make two rules of it"),
            ));
        }
        self.depth += 1;
        let inferred = self.infer_node(expr);
        self.depth -= 1;
        inferred
    }

    fn infer_node(&mut self, expr: &IdedExpr) -> Result<Type, Mistake> {
        let id = expr.id;
        match &expr.expr {
            Expr::Literal(literal) => Ok(match literal {
                LiteralValue::Boolean(_) => Type::Bool,
                LiteralValue::Int(_) => Type::Int,
                LiteralValue::Double(_) => Type::Double,
                LiteralValue::String(_) => Type::String,
                LiteralValue::Null => Type::Null,
                LiteralValue::UInt(_) => return Err((id, "write whole numbers without u".into())),
                LiteralValue::Bytes(_) => return Err((id, "bytes are not supported".into())),
            }),
            Expr::Ident(name) => self.ident(id, name),
            Expr::Select(select) => {
                let of = self.infer(&select.operand)?;
                self.field(id, &of, &select.field)
                    .map(|field| if select.test { Type::Bool } else { field })
            }
            Expr::List(list) => {
                self.found.longest_list = self.found.longest_list.max(list.elements.len());
                let mut of = None;
                for element in &list.elements {
                    let element = self.infer(element)?;
                    of = Some(match of {
                        None => element,
                        Some(of) if of == element => of,
                        Some(_) => Type::Dyn,
                    });
                }
                Ok(Type::List(of.unwrap_or(Type::Dyn).into()))
            }
            Expr::Map(map) => {
                for entry in &map.entries {
                    if let EntryExpr::MapEntry(entry) = &entry.expr {
                        self.infer(&entry.key)?;
                        self.infer(&entry.value)?;
                    }
                }
                Ok(Type::Map(Type::Dyn.into()))
            }
            Expr::Comprehension(comprehension) => self.comprehension(id, comprehension),
            Expr::Call(call) => self.call(id, call),
            Expr::Struct(_) | Expr::Unspecified => Err((id, "is not supported".into())),
        }
    }

    fn ident(&mut self, id: u64, name: &str) -> Result<Type, Mistake> {
        if let Some((_, local)) = self.locals.iter().rev().find(|(local, _)| local == name) {
            return Ok(local.clone());
        }
        let known = VARIABLES.iter().find(|(variable, _)| *variable == name);
        let Some(((known, _), of)) = known.zip(variable(name)) else {
            let names: Vec<_> = VARIABLES.iter().map(|(name, _)| *name).collect();
            return Err((
                id,
                format!(
                    "unknown variable {}: there are {}",
                    cut(name),
                    names.join(", ")
                ),
            ));
        };
        if !self.found.reads.contains(known) {
            self.found.reads.push(known);
        }
        Ok(of)
    }

    fn field(&self, id: u64, of: &Type, field: &str) -> Result<Type, Mistake> {
        match of {
            Type::Dyn => Ok(Type::Dyn),
            Type::Map(value) => Ok((**value).clone()),
            Type::Record(fields) => {
                let found = fields.iter().find(|(name, _)| *name == field);
                found.map(|(_, of)| (*of).into()).ok_or_else(|| {
                    let names: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
                    (
                        id,
                        format!(
                            "unknown field {}: there are {}",
                            cut(field),
                            names.join(", ")
                        ),
                    )
                })
            }
            other => Err((id, format!("a {other} has no field {}", cut(field)))),
        }
    }

    fn comprehension(&mut self, id: u64, of: &ComprehensionExpr) -> Result<Type, Mistake> {
        let element = match self.infer(&of.iter_range)? {
            Type::Dyn => Type::Dyn,
            Type::List(element) => *element,
            Type::Map(_) | Type::Record(_) => Type::String,
            other => return Err((id, format!("a {other} has no elements"))),
        };
        if self.loops >= LOOPS_MAX {
            return Err((id, format!("loops may be nested {LOOPS_MAX} deep")));
        }
        let accumulated = self.infer(&of.accu_init)?;
        let builds = u32::from(matches!(accumulated, Type::List(_)));
        self.loops += 1;
        let depth = u32::try_from(self.loops).unwrap_or(u32::MAX);
        self.found.loops.push(depth + builds);
        let before = self.locals.len();
        self.locals.push((of.iter_var.clone(), element));
        if let Some(second) = &of.iter_var2 {
            self.locals.push((second.clone(), Type::Dyn));
        }
        self.locals.push((of.accu_var.clone(), accumulated));
        self.infer(&of.loop_cond)?;
        self.infer(&of.loop_step)?;
        self.loops -= 1;
        let result = self.infer(&of.result)?;
        self.locals.truncate(before);
        Ok(result)
    }

    fn call(&mut self, id: u64, call: &CallExpr) -> Result<Type, Mistake> {
        let name = call.func_name.as_str();
        if name == op::ADD {
            self.addition(id, call)?;
        }
        if name == "matches" {
            self.pattern(id, call)?;
        }
        let mut of = Vec::with_capacity(call.args.len() + 1);
        if let Some(target) = &call.target {
            of.push(self.infer(target)?);
        }
        for arg in &call.args {
            of.push(self.infer(arg)?);
        }
        let wrong = |wants: &str| {
            let got: Vec<_> = of.iter().map(Type::to_string).collect();
            Err((
                id,
                format!("{} wants {wants}, not {}", shown(name), got.join(" and ")),
            ))
        };
        let all = |fits: fn(&Type) -> bool| of.iter().all(|of| *of == Type::Dyn || fits(of));
        match (name, of.as_slice()) {
            (op::LOGICAL_AND | op::LOGICAL_OR | op::LOGICAL_NOT | op::NOT_STRICTLY_FALSE, _) => {
                if !all(|of| *of == Type::Bool) {
                    return wrong("true or false on each side");
                }
                Ok(Type::Bool)
            }
            (op::EQUALS | op::NOT_EQUALS, [own, other]) => {
                let null = [own, other].contains(&&Type::Null);
                if !null && !own.agrees(other) {
                    return wrong("the same type on both sides");
                }
                Ok(Type::Bool)
            }
            (op::LESS | op::LESS_EQUALS | op::GREATER | op::GREATER_EQUALS, [own, other]) => {
                let ordered = |of: &Type| of.is_number() || *of == Type::String;
                if !all(ordered) || !own.agrees(other) {
                    return wrong("two numbers or two strings");
                }
                Ok(Type::Bool)
            }
            (op::ADD, [own, other]) => match (own, other) {
                (Type::Dyn, other) => Ok(other.clone()),
                (own, Type::Dyn) => Ok(own.clone()),
                (Type::List(own), Type::List(other)) => {
                    let of = if own == other {
                        (**own).clone()
                    } else {
                        Type::Dyn
                    };
                    Ok(Type::List(of.into()))
                }
                (Type::Int | Type::Double | Type::String, _) if own == other => Ok(own.clone()),
                _ => wrong("two ints, two doubles, two strings or two lists"),
            },
            (op::SUBSTRACT | op::MULTIPLY | op::DIVIDE | op::MODULO, [own, other]) => {
                match (own, other) {
                    (Type::Dyn, of) | (of, Type::Dyn) if of.is_number() || *of == Type::Dyn => {
                        Ok(of.clone())
                    }
                    (own, other) if own == other && own.is_number() => Ok(own.clone()),
                    _ => wrong("two ints or two doubles"),
                }
            }
            (op::NEGATE, [of]) if of.is_number() || *of == Type::Dyn => Ok(of.clone()),
            (op::INDEX, [list, at]) => match (list, at) {
                (Type::Dyn, _) => Ok(Type::Dyn),
                (Type::List(of), Type::Int | Type::Dyn) => Ok((**of).clone()),
                (Type::Map(of), Type::String | Type::Dyn) => Ok((**of).clone()),
                (Type::Record(_), _) => wrong("a field's name after a dot"),
                _ => wrong("a list and an int, or a map and a string"),
            },
            (op::CONDITIONAL, [test, yes, no]) => {
                if !matches!(test, Type::Bool | Type::Dyn) || !yes.agrees(no) {
                    return wrong("a condition and two values of one type");
                }
                Ok(if yes == no { yes.clone() } else { Type::Dyn })
            }
            (op::IN, [item, range]) => match range {
                Type::List(of) if item.agrees(of) => Ok(Type::Bool),
                Type::Map(_) | Type::Record(_) if item.agrees(&Type::String) => Ok(Type::Bool),
                Type::Dyn => Ok(Type::Bool),
                _ => wrong("a value, and a list or map that can hold it"),
            },
            ("size", [of]) => match of {
                Type::Dyn | Type::String | Type::List(_) | Type::Map(_) => Ok(Type::Int),
                _ => wrong("a string, list or map"),
            },
            ("contains" | "startsWith" | "endsWith" | "matches", [_, _]) => {
                if !all(|of| *of == Type::String) {
                    return wrong("two strings");
                }
                Ok(Type::Bool)
            }
            ("int", [Type::Dyn | Type::Int | Type::Double | Type::String]) => Ok(Type::Int),
            ("double", [Type::Dyn | Type::Int | Type::Double | Type::String]) => Ok(Type::Double),
            ("string", [Type::Dyn | Type::Int | Type::Double | Type::String | Type::Bool]) => {
                Ok(Type::String)
            }
            ("bool", [Type::Dyn | Type::Bool | Type::String]) => Ok(Type::Bool),
            (op::NEGATE | "int" | "double" | "string" | "bool", [_]) => wrong("a number or string"),
            _ => Err((
                id,
                format!(
                    "unknown function {} with {} arguments: there are {FUNCTIONS}",
                    cut(name),
                    call.args.len()
                ),
            )),
        }
    }

    /// A `+` that a loop was not expanded into costs what it copies, each time.
    fn addition(&mut self, id: u64, call: &CallExpr) -> Result<(), Mistake> {
        let accumulates = call.args.first().is_some_and(
            |first| matches!(&first.expr, Expr::Ident(name) if name.starts_with(['@', '_'])),
        );
        if accumulates {
            return Ok(());
        }
        if self.loops > 0 {
            return Err((
                id,
                "+ is not supported within all, exists, map and filter".into(),
            ));
        }
        self.additions += 1;
        if self.additions > ADDITIONS_MAX {
            return Err((id, format!("more than {ADDITIONS_MAX} additions")));
        }
        Ok(())
    }

    /// A pattern is compiled beforehand: it must be known by then.
    fn pattern(&mut self, id: u64, call: &CallExpr) -> Result<(), Mistake> {
        match call.args.last().map(|arg| &arg.expr) {
            Some(Expr::Literal(LiteralValue::String(pattern))) => {
                self.found.patterns.push(pattern.inner().to_string());
                Ok(())
            }
            _ => Err((
                id,
                "matches wants its pattern in quotes, for example action.name.matches('^send_')"
                    .into(),
            )),
        }
    }
}

/// The start of a name that may be long.
pub(super) fn cut(name: &str) -> String {
    const MOST: usize = 40;
    if name.chars().count() <= MOST {
        return format!("`{name}`");
    }
    format!("`{}…`", name.chars().take(MOST).collect::<String>())
}

/// An operator as it is written.
fn shown(name: &str) -> String {
    cut(match name {
        op::CONDITIONAL => "? :",
        op::IN => "in",
        op::INDEX => "[ ]",
        name => name.trim_matches('_'),
    })
}
