//! The URL of a PostgreSQL, with what of it may be shown.

use std::fmt;

/// A PostgreSQL URL. Display and Debug leave out password and options.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl {
    full: String,
    shown: String,
}

impl DatabaseUrl {
    /// Parses `postgres://USER:PASSWORD@HOST:PORT/DATABASE?OPTIONS`. The error says
    /// what is wanted and repeats nothing of the text.
    ///
    /// A password with an unescaped `/`, `?`, `#` or `@` is refused rather than
    /// guessed at: a part of it would be taken for a host, and be shown as one.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const UNESCAPED: &str = "is not a URL of PostgreSQL; in a password write `/` as %2F, `?` \
                                 as %3F, `#` as %23, `@` as %40 and `:` as %3A";
        let (scheme, rest) = text
            .split_once("://")
            .filter(|(scheme, _)| matches!(*scheme, "postgres" | "postgresql"))
            .ok_or("is not a URL such as postgres://remit:secret@db:5432/remit")?;
        if rest
            .chars()
            .any(|c| c.is_whitespace() || c.is_control() || c == '#')
        {
            return Err(UNESCAPED);
        }
        let (location, options) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = location.split_once('/').unwrap_or((location, ""));
        let (user, host) = match authority.rsplit_once('@') {
            Some((login, host)) => (login.split(':').next(), host),
            None => (None, authority),
        };
        let is_whole = !options.contains('@')
            && !database.contains(['@', '/', ':'])
            && authority.matches('@').count() <= 1
            && is_host(host);
        if !is_whole {
            return Err(UNESCAPED);
        }
        let password = authority
            .rsplit_once('@')
            .and_then(|(login, _)| login.split_once(':'));
        let mut shown = format!("{scheme}://");
        if let Some(user) = user {
            shown.push_str(user);
            shown.push_str(if password.is_some() { ":***@" } else { "@" });
        }
        shown.push_str(host);
        if !database.is_empty() {
            shown.push('/');
            shown.push_str(database);
        }
        Ok(Self {
            full: text.to_owned(),
            shown,
        })
    }

    /// Stands for a URL that could not be parsed, until the mistakes are reported.
    pub(super) fn unknown() -> Self {
        Self {
            full: String::new(),
            shown: String::new(),
        }
    }

    /// The URL with its password, for nothing but connecting.
    pub fn expose(&self) -> &str {
        &self.full
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({})", self.shown)
    }
}

/// A host with or without a port, or nothing (then it stands in the options).
fn is_host(text: &str) -> bool {
    let after_host = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((_, after)) => after,
        None => &text[text.find(':').unwrap_or(text.len())..],
    };
    after_host.is_empty()
        || after_host
            .strip_prefix(':')
            .is_some_and(|port| port.parse::<u16>().is_ok())
}
