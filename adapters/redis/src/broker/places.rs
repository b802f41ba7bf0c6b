//! Names: the streams that are read, and what hapax keeps beside each. All of one stream share its slot in a cluster, since a
//! script may touch one slot only.

use hapax::{Error, ErrorKind, Result};

/// Longest name of a stream or group.
const NAME_MAX: usize = 128;

/// A stream with what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The stream that others write.
    pub(super) stream: Box<str>,
    /// The stream of retries, which this group alone reads.
    pub(super) again: Box<str>,
    /// The sorted set of what waits for its time.
    pub(super) due: Box<str>,
    /// The stream of dead letters.
    pub(super) dead: Box<str>,
}

impl Place {
    pub(super) fn new(stream: &str, group: &str, dead: Option<&str>) -> Self {
        // A name with a hash tag keeps it; any other becomes the tag, which lands in the slot of the name itself.
        let beside = |what| match tag(stream) {
            Some(_) => format!("{stream}.{group}.{what}").into(),
            None => format!("{{{stream}}}.{group}.{what}").into(),
        };
        let dead = dead.map_or_else(|| beside("dead"), Into::into);
        Self { stream: stream.into(), again: beside("again"), due: beside("due"), dead }
    }
}

/// One stream of an `XREADGROUP`.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) key: Box<str>,
    /// Which place it belongs to.
    pub(super) place: usize,
    /// Whether it is the stream of retries.
    pub(super) again: bool,
}

pub(super) fn sources(places: &[Place]) -> Vec<Source> {
    let both = |(place, names): (usize, &Place)| {
        [(&names.stream, false), (&names.again, true)].map(|(key, again)| Source { key: key.clone(), place, again })
    };
    places.iter().enumerate().flat_map(both).collect()
}

/// Checks a name; `what` is the setting it came from.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_.:-/{}".contains(c);
    let braces = name.matches(['{', '}']).count();
    let tagged = braces == 0 || (braces == 2 && tag(name).is_some());
    if !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(allowed) && tagged {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Configuration, "open").because(format!(
        "{what}: a name has 1 to {NAME_MAX} of the characters A-Z a-z 0-9 _ . : - / and at most one hash tag in braces"
    )))
}

/// The hash tag of a key: what stands between the first `{` and the next `}`, if anything does.
fn tag(key: &str) -> Option<&str> {
    let (_, behind) = key.split_once('{')?;
    behind.split_once('}').map(|(tag, _)| tag).filter(|tag| !tag.is_empty())
}

/// The slot of a key in a cluster (Redis cluster specification, "Key distribution model").
pub(crate) fn slot(key: &str) -> u16 {
    let mut crc: u16 = 0;
    for byte in tag(key).unwrap_or(key).bytes() {
        crc ^= u16::from(byte) << 8;
        for _ in 0..8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
        }
    }
    crc % 16_384
}

/// In a cluster all keys of one read and of one script must share a slot.
pub(super) fn check_slots(places: &[Place]) -> Result<()> {
    let Some(first) = places.first() else { return Ok(()) };
    let home = slot(&first.stream);
    for place in places {
        for key in [&place.stream, &place.again, &place.due, &place.dead] {
            if slot(key) != home {
                return Err(Error::new(ErrorKind::Configuration, "open").because(format!(
                    "streams and dead_letters: `{key}` is in another slot of the cluster than `{}`, and one read takes one slot: give \
                     them a common hash tag, as in {{shop}}orders and {{shop}}payments, or take a broker for each",
                    first.stream
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(slot("123456789"), 0x31C3);
        assert_eq!(slot("foo"), 12_182);
        assert_eq!(slot("{user1000}.following"), slot("user1000"));
        assert_eq!(slot("foo{}{bar}"), slot("foo{}{bar}"));
        assert_ne!(slot("foo{}{bar}"), slot("bar"), "an empty tag is none");
    }

    #[test]
    fn companions_share_the_slot_of_their_stream() {
        for stream in ["orders", "{shop}orders", "a.b:c"] {
            let place = Place::new(stream, "billing", None);
            check_slots(std::slice::from_ref(&place)).unwrap();
            assert_ne!(place.again, place.dead);
        }
        assert_eq!(&*Place::new("orders", "billing", None).dead, "{orders}.billing.dead");
        assert_eq!(&*Place::new("{shop}orders", "billing", None).due, "{shop}orders.billing.due");
    }

    #[test]
    fn streams_of_several_slots_are_refused_with_the_remedy() {
        let places = ["orders", "payments"].map(|stream| Place::new(stream, "g", None));
        let error = check_slots(&places).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        assert!(error.to_string().contains("hash tag"), "{error}");
        check_slots(&["{a}x", "{a}y"].map(|stream| Place::new(stream, "g", None))).unwrap();
    }

    #[test]
    fn a_bad_name_is_refused_and_named() {
        for bad in ["", "a b", "ü", "a\n", "{a", "a}", "{a}{b}", "{}a", &"x".repeat(129)] {
            let error = check_name("group", bad).unwrap_err();
            assert!(error.to_string().contains("group:"), "{bad:?}: {error}");
        }
        for good in ["orders", "{shop}orders", "shop.orders:v2/eu-1"] {
            check_name("stream", good).unwrap();
        }
    }
}
