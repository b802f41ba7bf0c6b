//! Secrets stay secret: a URL that never prints its credentials, and the redaction of texts that come from clients.
//!
//! The URL is split here and not by the `url` crate: that one prints passwords in `Debug` and `Display`, refuses the lists
//! of hosts that brokers and replicated databases take, and would bring the Unicode tables of internationalised names
//! (some thirty crates) into the core.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use crate::error::{Error, ErrorKind, Result};

/// What stands in the place of a secret.
const HIDDEN: &str = "***";

/// A URL of a broker or store. `Debug` and `Display` show scheme, hosts, path and the names of the parameters, never
/// user, password, a parameter's value or the fragment. Deliberately not `Serialize`.
///
/// Several hosts (`amqp://u:p@a:5672,b:5672/`) and forms without `//` (`sqlite::memory:`) are fine. A `/`, `?`, `#` or
/// `@` inside user, password or a value must be percent-encoded; where that leaves in doubt where the password ends, parsing
/// fails rather than guess.
///
/// ```
/// use hapax::SecretUrl;
///
/// let url: SecretUrl = "postgres://app:hunter2@db-1:5432,db-2/shop?sslmode=require".parse()?;
/// assert_eq!(url.to_string(), "postgres://***@db-1:5432,db-2/shop?sslmode=***");
/// assert!(url.expose().contains("hunter2"));
/// # Ok::<(), hapax::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(Box<str>);

impl SecretUrl {
    /// Takes it, if it is a URL. The error never quotes it.
    pub fn parse(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        match Parts::split(&text) {
            Ok(_) => Ok(Self(text.into_boxed_str())),
            Err(why) => Err(Error::new(ErrorKind::Configuration, "parse url").because(why)),
        }
    }

    /// All of it, with its secrets: for the client that connects, never for a text.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What stands before the colon: `redis`, `amqps`.
    pub fn scheme(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }
}

impl FromStr for SecretUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl<'de> Deserialize<'de> for SecretUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Parts::split(&self.0) {
            Ok(parts) => parts.fmt(f),
            Err(_) => f.write_str(HIDDEN),
        }
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretUrl({self})")
    }
}

/// A URL, split, with what may be shown and whether there was something that may not.
struct Parts<'a> {
    scheme: &'a str,
    /// `None` where there is no `//`: then nothing behind the scheme is shown.
    place: Option<Place<'a>>,
}

struct Place<'a> {
    user: bool,
    hosts: &'a str,
    path: &'a str,
    query: Option<&'a str>,
    fragment: bool,
}

impl<'a> Parts<'a> {
    fn split(text: &'a str) -> Result<Self, &'static str> {
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err("a url has no spaces or control characters");
        }
        let (scheme, rest) = text.split_once(':').ok_or("a url begins with a scheme, as in redis://host")?;
        let shaped = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
        if !shaped || rest.is_empty() {
            return Err("a url begins with a scheme, as in redis://host");
        }
        let Some(rest) = rest.strip_prefix("//") else {
            // What looks like user:password@host without a scheme would show the user.
            return if rest.contains('@') {
                Err("credentials need scheme:// before them")
            } else {
                Ok(Self { scheme, place: None })
            };
        };
        let (authority, behind) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        if behind.contains('@') && !authority.is_empty() {
            return Err("write / ? # and @ inside user, password, path and values as %2F %3F %23 %40");
        }
        let (user, hosts) = authority.rsplit_once('@').map_or((false, authority), |(_, hosts)| (true, hosts));
        if !hosts.split(',').all(is_host) {
            return Err("a host is a name or address with an optional numeric port");
        }
        let (behind, fragment) = behind.split_once('#').map_or((behind, false), |(before, _)| (before, true));
        let (path, query) = behind.split_once('?').map_or((behind, None), |(path, query)| (path, Some(query)));
        Ok(Self { scheme, place: Some(Place { user, hosts, path, query, fragment }) })
    }
}

/// A name or address, and a port of digits: else a forgotten host (`amqp://user:password`) would show a password.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => (address, port.strip_prefix(':').or(port.is_empty().then_some(""))),
        None => text.split_once(':').map_or((text, Some("")), |(name, port)| (name, Some(port))),
    };
    let named = name.chars().all(|c| c.is_alphanumeric() || "-._:%~".contains(c));
    named && port.is_some_and(|port| port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()))
}

impl fmt::Display for Parts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(place) = &self.place else {
            return write!(f, "{}:{HIDDEN}", self.scheme);
        };
        write!(f, "{}://", self.scheme)?;
        if place.user {
            write!(f, "{HIDDEN}@")?;
        }
        write!(f, "{}{}", place.hosts, place.path)?;
        for (at, pair) in place.query.into_iter().flat_map(|query| query.split('&')).enumerate() {
            f.write_str(if at == 0 { "?" } else { "&" })?;
            match pair.split_once('=') {
                Some((name, _)) => write!(f, "{name}={HIDDEN}")?,
                None => f.write_str(HIDDEN)?,
            }
        }
        if place.fragment { write!(f, "#{HIDDEN}") } else { Ok(()) }
    }
}

/// Hides the credentials in a text that came from a client or a handler: `scheme://user:pass@`, `password=..`,
/// `"secret": ".."`, `Authorization: Bearer ..`. In doubt it hides too much. Texts without any are lent back.
///
/// ```
/// let text = "cannot reach amqp://shop:hunter2@mq:5672 (password=hunter2)";
/// assert_eq!(hapax::redact(text), "cannot reach amqp://***@mq:5672 (password=***");
/// ```
pub fn redact(text: &str) -> Cow<'_, str> {
    let mut spans = Vec::new();
    credentials_in_urls(text, &mut spans);
    credentials_after_words(text, &mut spans);
    if spans.is_empty() {
        return Cow::Borrowed(text);
    }
    spans.sort_unstable();
    let (mut out, mut shown) = (String::with_capacity(text.len()), 0);
    for (from, to) in spans {
        if to <= shown {
            continue;
        }
        if from >= shown {
            out.push_str(&text[shown..from]);
            out.push_str(HIDDEN);
        }
        shown = to;
    }
    out.push_str(&text[shown..]);
    Cow::Owned(out)
}

/// From behind `://` to the last `@` before a space, quote or angle bracket.
fn credentials_in_urls(text: &str, spans: &mut Vec<(usize, usize)>) {
    for (at, mark) in text.match_indices("://") {
        let from = at + mark.len();
        let url = &text[from..];
        let url = &url[..url.find(|c: char| c.is_whitespace() || "\"<>`".contains(c)).unwrap_or(url.len())];
        if let Some(length) = url.rfind('@') {
            spans.push((from, from + length));
        }
    }
}

/// The ends of names whose values are secret, compared without case, `_`, `-` and `.`.
const SECRET_NAMES: [&str; 14] = [
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "token",
    "apikey",
    "accesskey",
    "accountkey",
    "privatekey",
    "secretkey",
    "credential",
    "credentials",
    "authorization",
];

/// The value behind `name=` or `name:` where the name ends in one of [`SECRET_NAMES`], and what follows a scheme of HTTP
/// authentication.
fn credentials_after_words(text: &str, spans: &mut Vec<(usize, usize)>) {
    let is_word = |c: char| c.is_alphanumeric() || "_-.".contains(c);
    let mut at = 0;
    while let Some(begin) = text[at..].find(is_word).map(|found| at + found) {
        let end = text[begin..].find(|c| !is_word(c)).map_or(text.len(), |length| begin + length);
        at = end;
        let word = &text[begin..end];
        if let Some(value) = value_behind(&text[end..], is_secret_name(word), is_scheme(word)) {
            spans.push((end + value.0, end + value.1));
            at = end + value.1;
        }
    }
}

fn is_secret_name(word: &str) -> bool {
    let plain: String = word.chars().filter(|c| c.is_alphanumeric()).map(|c| c.to_ascii_lowercase()).collect();
    SECRET_NAMES.iter().any(|name| plain.ends_with(name))
}

fn is_scheme(word: &str) -> bool {
    word.eq_ignore_ascii_case("bearer") || word.eq_ignore_ascii_case("basic")
}

/// Where the secret is in what follows a word, if there is one.
fn value_behind(rest: &str, secret_name: bool, scheme: bool) -> Option<(usize, usize)> {
    let from = if secret_name {
        let separator = rest.find(|c: char| !(c.is_whitespace() || "\"'\\".contains(c)))?;
        if !rest[separator..].starts_with(['=', ':']) {
            return None;
        }
        let behind = separator + 1;
        behind + rest[behind..].find(|c: char| !(c.is_whitespace() || "=>".contains(c)))?
    } else if scheme && rest.starts_with(' ') {
        rest.find(|c: char| c != ' ')?
    } else {
        return None;
    };
    let length = value_length(&rest[from..]);
    (length > 0).then_some((from, from + length))
}

/// How long a value is: to a space or separator, quoted parts whole; with the word behind a scheme of HTTP authentication.
fn value_length(value: &str) -> usize {
    let mut at = 0;
    while let Some(c) = value[at..].chars().next() {
        let rest = &value[at..];
        if let Some(quoted) = rest.strip_prefix('\\').filter(|rest| rest.starts_with(['"', '\''])) {
            // A quote that is escaped itself, as in JSON inside JSON: it ends at the next of its kind.
            at += 2 + quoted[1..].find(&quoted[..1]).map_or(quoted.len() - 1, |length| length + 1);
        } else if c == '"' || c == '\'' {
            at += 1 + quoted_length(&rest[1..], c);
        } else if c.is_whitespace() && is_scheme(&value[..at]) {
            at += rest.len() - rest.trim_start().len();
        } else if c.is_whitespace() || ",;&".contains(c) {
            break;
        } else {
            at += c.len_utf8();
        }
    }
    at
}

/// To behind the closing quote, or to the end where there is none.
fn quoted_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANARY: &str = "c4nary";

    fn shown(text: &str) -> String {
        let url = SecretUrl::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(url.expose(), text);
        assert_eq!(format!("{url:?}"), format!("SecretUrl({url})"));
        url.to_string()
    }

    #[test]
    fn a_url_shows_where_it_leads_and_nothing_secret() {
        for (text, expected) in [
            ("redis://c4nary:c4nary@cache:6379/0", "redis://***@cache:6379/0"),
            ("redis://:c4nary@cache", "redis://***@cache"),
            ("redis://c4nary@cache", "redis://***@cache"),
            ("amqps://u:c4n@c4nary@mq-1:5671,mq-2:5671/%2f", "amqps://***@mq-1:5671,mq-2:5671/%2f"),
            ("postgres://h/db?password=c4nary&sslmode=c4nary", "postgres://h/db?password=***&sslmode=***"),
            ("postgres:///db?c4nary", "postgres:///db?***"),
            ("http://[::1]:8080/x#c4nary", "http://[::1]:8080/x#***"),
            ("sqlite:c4nary", "sqlite:***"),
            ("sqlite:///data/a@b.db", "sqlite:///data/a@b.db"),
        ] {
            let shown = shown(text);
            assert_eq!(shown, expected);
            assert!(!shown.contains(CANARY));
        }
    }

    #[test]
    fn a_url_whose_password_ends_nobody_knows_where_is_refused_and_not_quoted() {
        for text in [
            "redis://user:c4/nary@cache",
            "redis://user:c4?nary@cache",
            "redis://user:c4#nary@cache",
            "amqp://user:c4nary",
            "c4nary:c4nary@cache",
            "c4nary",
            "",
            "redis:",
            "redis://us er:c4nary@h",
            "redis://[c4nary",
            "://c4nary",
        ] {
            let error = SecretUrl::parse(text).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Configuration);
            assert!(!format!("{error} {error:?}").contains("c4"), "{error}");
        }
        let error = serde_json::from_str::<SecretUrl>(r#""redis://user:c4/nary@h""#).expect_err("refused");
        assert!(!error.to_string().contains("nary"));
    }

    #[test]
    fn credentials_in_an_error_text_are_hidden() {
        for (text, expected) in [
            ("connect redis://u:c4nary@h:1/0 failed", "connect redis://***@h:1/0 failed"),
            ("connect redis://u:c4/n?a#ry@h failed", "connect redis://***@h failed"),
            ("password=c4nary host=db", "password=*** host=db"),
            ("PGPASSWORD: c4nary, retry", "PGPASSWORD: ***, retry"),
            ("{\"password\":\"c4nary c4nary\",\"id\":7}", "{\"password\":***,\"id\":7}"),
            (r#"{"a":"{\"api_key\":\"c4nary\",\"b\":1}"}"#, r#"{"a":"{\"api_key\":***,\"b\":1}"}"#),
            (r#"Config { secret: Some("c4\" nary"), n: 1 }"#, "Config { secret: ***, n: 1 }"),
            ("sasl.password = 'c4nary c4nary' ok", "sasl.password = *** ok"),
            ("Authorization: Bearer c4nary end", "Authorization: *** end"),
            ("header Basic c4nary end", "header Basic *** end"),
            ("https://h/x?token=c4nary&page=2", "https://h/x?token=***&page=2"),
            ("Endpoint=sb://x;SharedAccessKey=c4nary;E=1", "Endpoint=sb://x;SharedAccessKey=***;E=1"),
            ("pwd => c4nary", "pwd => ***"),
            ("redis://u:c4nary@h password=c4nary", "redis://***@h password=***"),
            ("https://u:p@h/?password=c4nary", "https://***@h/?password=***"),
        ] {
            let hidden = redact(text);
            assert_eq!(hidden, expected);
            assert!(!hidden.contains("nary"));
        }
    }

    #[test]
    fn a_text_without_credentials_stays_as_it_is() {
        for text in [
            "",
            "the server is restarting",
            "password authentication failed for user \"app\"",
            "cannot reach https://example.org/a?b=c: timed out",
            "order 7: card declined; key=4711, tokens left: 3",
        ] {
            assert!(matches!(redact(text), Cow::Borrowed(same) if same == text), "{text}: {}", redact(text));
        }
    }

    /// A text put together at random from `parts`, the same for the same seed.
    fn woven(random: &mut fastrand::Rng, parts: &[&str]) -> String {
        (0..random.usize(0..24)).map(|_| parts[random.usize(0..parts.len())]).collect()
    }

    #[test]
    fn no_text_makes_redaction_panic() {
        let parts =
            ["password", "token=", "://", "@", "\"", "'", "\\", " ", ":", "=", "é", "x", "Bearer ", "?", "[", "]"];
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..20_000 {
            let text = woven(&mut random, &parts);
            assert!(redact(&text).len() <= text.len() * 4 + 3, "{text}");
            let _ = SecretUrl::parse(text.as_str()).map(|url| url.to_string());
        }
    }

    #[test]
    fn whatever_a_password_is_made_of_it_is_never_shown() {
        let parts =
            ["a", "%40", "%2F", ":", "!", "$", "&", "'", "(", ")", "*", "+", ",", ";", "=", "~", ".", "-", "://"];
        let mut random = fastrand::Rng::with_seed(2);
        for _ in 0..20_000 {
            let password = woven(&mut random, &parts);
            let text = format!("redis://user:{CANARY}{password}{CANARY}@cache:6379/0?password={CANARY}");
            if let Ok(url) = SecretUrl::parse(text.as_str()) {
                assert!(!format!("{url} {url:?}").contains(CANARY), "{text}");
            } else {
                assert!(password.contains('/'), "{text} is a url");
            }
            let line = format!("cannot reach '{text}' now");
            assert!(!redact(&line).contains(CANARY), "{line}: {}", redact(&line));
        }
    }
}
