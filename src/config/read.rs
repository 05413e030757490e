//! Turns single texts into typed values, and collects what is wrong with them.
//!
//! Every method returns a value, also for a text that is wrong: [`Reader::finish`]
//! throws the whole away then, and the settings after it are still looked at.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use tracing_subscriber::EnvFilter;

use super::args::Hidden;
use super::{API_KEY_VARIABLE, ApiKeyText, ConfigErrors, DatabaseUrl, LogFormat, Target};

/// The longest path that every system takes for a Unix socket, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 103;

/// How much of a wrong text is repeated, in characters.
const SHOWN_CHARS_MAX: usize = 80;

/// A key file holds one line of about 80 bytes.
const KEY_FILE_BYTES_MAX: u64 = 4_096;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// A flag's name without its dashes. Display adds the variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flag(pub(super) &'static str);

impl Flag {
    pub(super) fn variable(self) -> String {
        format!("REMIT_{}", self.0.replace('-', "_").to_ascii_uppercase())
    }
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--{} ({})", self.0, self.variable())
    }
}

/// Collects mistakes.
#[derive(Default)]
pub(super) struct Reader {
    lines: Vec<String>,
    wrong: Vec<Flag>,
}

impl Reader {
    /// `config`, if nothing was wrong.
    pub(super) fn finish<T>(self, config: T) -> Result<T, ConfigErrors> {
        if self.lines.is_empty() {
            Ok(config)
        } else {
            Err(ConfigErrors(self.lines))
        }
    }

    /// Notes a mistake. `what` completes a sentence that begins with the flag, and
    /// repeats nothing that may be secret.
    pub(super) fn wrong(&mut self, flag: Flag, what: &str) {
        self.lines.push(format!("{flag} {what}"));
        self.wrong.push(flag);
    }

    /// Whether nothing was wrong with the flag so far.
    pub(super) fn is_right(&self, flag: Flag) -> bool {
        !self.wrong.contains(&flag)
    }

    fn unwanted(&mut self, flag: Flag, given: &OsStr, want: &str) {
        self.wrong(flag, &format!("is {}, want {want}", shown(given)));
    }

    pub(super) fn listen(&mut self, flag: Flag, given: &OsStr) -> Option<SocketAddr> {
        if given == "none" {
            return None;
        }
        let address = given.to_str().and_then(|text| text.parse().ok());
        if address.is_none() {
            self.unwanted(
                flag,
                given,
                "a numeric address with a port, such as 127.0.0.1:50051 or [::]:50051, or `none`",
            );
        }
        Some(address.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))))
    }

    pub(super) fn path(&mut self, flag: Flag, given: Option<OsString>) -> Option<PathBuf> {
        let given = given?;
        if given.is_empty() {
            self.unwanted(flag, &given, "a path; without one, leave the setting out");
        }
        Some(given.into())
    }

    pub(super) fn socket(&mut self, flag: Flag, given: Option<OsString>) -> Option<PathBuf> {
        let path = self.path(flag, given)?;
        let bytes = path.as_os_str().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            self.wrong(
                flag,
                &format!("is a path of {bytes} bytes, a socket's can have {SOCKET_PATH_BYTES_MAX}"),
            );
        }
        Some(path)
    }

    /// A file that must be there.
    pub(super) fn file(&mut self, flag: Flag, given: Option<OsString>) -> Option<PathBuf> {
        self.existing(flag, given, "a file that can be read", |path| {
            std::fs::File::open(path)?.metadata().map(|m| !m.is_dir())
        })
    }

    /// A folder that must be there.
    pub(super) fn folder(&mut self, flag: Flag, given: Option<OsString>) -> Option<PathBuf> {
        self.existing(flag, given, "a folder", |path| {
            std::fs::metadata(path).map(|m| m.is_dir())
        })
    }

    fn existing(
        &mut self,
        flag: Flag,
        given: Option<OsString>,
        want: &str,
        is_kind: impl FnOnce(&Path) -> std::io::Result<bool>,
    ) -> Option<PathBuf> {
        let path = self.path(flag, given)?;
        if self.is_right(flag) {
            match is_kind(&path) {
                Ok(true) => {}
                Ok(false) => self.unwanted(flag, path.as_os_str(), want),
                Err(e) => self.unwanted(flag, path.as_os_str(), &format!("{want}: {e}")),
            }
        }
        Some(path)
    }

    pub(super) fn switch(&mut self, flag: Flag, given: Option<OsString>) -> bool {
        let Some(given) = given else {
            return false;
        };
        match given.to_str() {
            Some("true" | "1" | "yes" | "on") => true,
            Some("false" | "0" | "no" | "off") => false,
            _ => {
                self.unwanted(flag, &given, "true or false");
                false
            }
        }
    }

    pub(super) fn count<T>(&mut self, flag: Flag, given: &OsStr, range: RangeInclusive<T>) -> T
    where
        T: Copy + PartialOrd + fmt::Display + std::str::FromStr,
    {
        let number = digits(given).and_then(|text| text.parse().ok());
        if let Some(number) = number.filter(|number| range.contains(number)) {
            return number;
        }
        let want = format!("a whole number from {} to {}", range.start(), range.end());
        self.unwanted(flag, given, &want);
        *range.start()
    }

    /// A number of bytes: `1048576`, `1024KiB`, `1MiB`.
    pub(super) fn size(
        &mut self,
        flag: Flag,
        given: &OsStr,
        range: RangeInclusive<usize>,
    ) -> usize {
        let bytes = given.to_str().and_then(|text| {
            let (number, unit) = split_unit(text)?;
            let factor = match unit {
                "" => 1,
                "KiB" => 1_024,
                "MiB" => 1_024 * 1_024,
                _ => return None,
            };
            number.parse::<usize>().ok()?.checked_mul(factor)
        });
        if let Some(bytes) = bytes.filter(|bytes| range.contains(bytes)) {
            return bytes;
        }
        let want = format!(
            "a size such as 1048576, 512KiB or 8MiB, from {} to {} bytes",
            range.start(),
            range.end()
        );
        self.unwanted(flag, given, &want);
        *range.start()
    }

    /// A whole number with `ms`, `s`, `m` or `h`.
    pub(super) fn duration(
        &mut self,
        flag: Flag,
        given: &OsStr,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let duration = given.to_str().and_then(|text| {
            let (number, unit) = split_unit(text)?;
            let factor_ms: u64 = match unit {
                "ms" => 1,
                "s" => 1_000,
                "m" => 60_000,
                "h" => 3_600_000,
                _ => return None,
            };
            let count = number.parse::<u64>().ok()?;
            Some(Duration::from_millis(count.checked_mul(factor_ms)?))
        });
        if let Some(duration) = duration.filter(|duration| range.contains(duration)) {
            return duration;
        }
        let want = format!(
            "a duration with its unit such as 500ms, 10s or 2m, from {} to {}",
            written(*range.start()),
            written(*range.end())
        );
        self.unwanted(flag, given, &want);
        *range.start()
    }

    pub(super) fn log_format(&mut self, flag: Flag, given: &OsStr) -> LogFormat {
        match given.to_str() {
            Some("text") => return LogFormat::Text,
            Some("json") => return LogFormat::Json,
            _ => self.unwanted(flag, given, "text or json"),
        }
        LogFormat::Text
    }

    pub(super) fn log_filter(&mut self, flag: Flag, given: &OsStr) -> String {
        const WANT: &str = "a level (error, warn, info, debug, trace, off), or a list such as \
                            `info,remit::request=warn`";
        let text = given.to_string_lossy().into_owned();
        // The filter syntax takes a lone word for a module and would log nothing
        // else, which is what a misspelt level does.
        let is_misspelt = text.bytes().all(|b| b.is_ascii_alphanumeric())
            && !LEVELS.contains(&text.to_ascii_lowercase().as_str());
        if is_misspelt || given.to_str().is_none() {
            self.unwanted(flag, given, WANT);
        } else if let Err(e) = EnvFilter::builder().parse(&text) {
            self.unwanted(flag, given, &format!("{WANT}: {e}"));
        }
        text
    }

    /// The text is never repeated: it may hold a password wherever it is wrong.
    pub(super) fn database_url(
        &mut self,
        flag: Flag,
        given: Option<Hidden>,
    ) -> Option<DatabaseUrl> {
        let parsed = match given?.0.to_str() {
            Some(text) => DatabaseUrl::parse(text),
            None => Err("must be UTF-8"),
        };
        // Some in any case: the settings that exclude this one are still checked.
        Some(parsed.unwrap_or_else(|what| {
            self.wrong(flag, what);
            DatabaseUrl::unknown()
        }))
    }

    pub(super) fn target(&mut self, flag: Flag, given: &OsStr) -> Target {
        if let Some(path) = given.as_bytes().strip_prefix(b"unix:") {
            // `unix://` comes before an absolute path, `unix:` before any.
            let path = path.strip_prefix(b"//").unwrap_or(path);
            let path = self.socket(flag, Some(OsStr::from_bytes(path).to_owned()));
            return Target::Unix(path.unwrap_or_default());
        }
        let uri = given
            .to_str()
            .and_then(|text| text.parse::<Uri>().ok())
            .filter(|uri| {
                matches!(uri.scheme_str(), Some("http" | "https"))
                    && uri.host().is_some_and(|host| !host.is_empty())
                    && uri.authority().is_some_and(|a| !a.as_str().contains('@'))
                    && matches!(uri.path(), "" | "/")
                    && uri.query().is_none()
            });
        if uri.is_none() {
            self.unwanted(
                flag,
                given,
                "http://HOST:PORT, https://HOST:PORT or unix:PATH",
            );
        }
        Target::Tcp(uri.unwrap_or_default())
    }

    pub(super) fn key_file(&mut self, flag: Flag, given: OsString) -> Option<ApiKeyText> {
        let path = self.file(flag, Some(given))?;
        if !self.is_right(flag) {
            return None;
        }
        match read_bounded(&path) {
            Ok(text) => {
                let key = api_key(&text);
                if key.is_none() {
                    self.wrong(flag, "is a file without a key in it: want one line `rmt_…`");
                }
                key
            }
            Err(e) => {
                self.unwanted(
                    flag,
                    path.as_os_str(),
                    &format!("a file that can be read: {e}"),
                );
                None
            }
        }
    }

    pub(super) fn key_variable(&mut self, given: Option<OsString>) -> Option<ApiKeyText> {
        let given = given?;
        let key = given.to_str().and_then(api_key);
        if key.is_none() {
            self.lines
                .push(format!("{API_KEY_VARIABLE} is not a key: want `rmt_…`"));
        }
        key
    }
}

fn api_key(text: &str) -> Option<ApiKeyText> {
    let key = text.trim();
    let is_key = key.starts_with("rmt_") && key.bytes().all(|b| b.is_ascii_graphic());
    is_key.then(|| ApiKeyText(key.to_owned()))
}

fn read_bounded(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(KEY_FILE_BYTES_MAX)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// The text, if it has only digits: `parse` would take a sign too.
fn digits(text: &OsStr) -> Option<&str> {
    text.to_str()
        .filter(|text| text.bytes().all(|b| b.is_ascii_digit()))
}

fn split_unit(text: &str) -> Option<(&str, &str)> {
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    (!number.is_empty()).then_some((number, unit))
}

/// A duration as the settings write it, in its largest whole unit.
pub(super) fn written(duration: Duration) -> String {
    let ms = duration.as_millis();
    let (factor_ms, unit) = [(3_600_000, "h"), (60_000, "m"), (1_000, "s")]
        .into_iter()
        .find(|(factor_ms, unit)| ms.is_multiple_of(*factor_ms) && (ms > 0 || *unit == "s"))
        .unwrap_or((1, "ms"));
    format!("{}{unit}", ms / factor_ms)
}

/// A wrong text as it is repeated: short, on one line, and not at all where a
/// secret may have been put into the wrong place.
fn shown(given: &OsStr) -> String {
    let text = given.to_string_lossy();
    let lower = text.to_ascii_lowercase();
    if lower.contains("rmt_")
        || lower.contains("password")
        || (lower.contains("://") && text.contains('@'))
    {
        return "a text that looks like a secret".to_owned();
    }
    if text.is_empty() {
        return "empty".to_owned();
    }
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}
