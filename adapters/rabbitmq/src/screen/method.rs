//! Method frames, looked through for the texts that RabbitMQ does not check.
//!
//! It takes any bytes as the routing key of a message, and cuts its own explanations at 255 bytes wherever that is. lapin ends the
//! connection over a text that is no UTF-8, at every delivery again. A `?` stands for what cannot be read; no length changes,
//! and nothing here depends on the key under which a message came.

use super::header::{Changed, Cursor, HEAD_BYTES, Malformed};

/// What stands in a method's arguments.
#[derive(Clone, Copy)]
enum Argument {
    Short,
    Fixed(usize),
}

/// Mends the frame in its place; answers whether that was needed. A frame that is not as AMQP says is left to lapin.
pub(super) fn mend(frame: &mut [u8]) -> bool {
    let mut changed = Changed::default();
    let _ = walk(frame, &mut changed);
    changed.text
}

fn walk(frame: &mut [u8], changed: &mut Changed) -> Result<(), Malformed> {
    let end = frame.len().checked_sub(1).ok_or(Malformed)?;
    let mut cursor = Cursor { bytes: frame, at: HEAD_BYTES, changed };
    let method = cursor.skip(4, end).map(|said| [said[0], said[1], said[2], said[3]])?;
    for argument in arguments(method) {
        match argument {
            Argument::Short => cursor.short(end)?,
            Argument::Fixed(bytes) => drop(cursor.skip(*bytes, end)?),
        }
    }
    Ok(())
}

/// The arguments up to the last text that another client, or a cut, may have spoiled.
fn arguments(method: [u8; 4]) -> &'static [Argument] {
    use Argument::{Fixed, Short};
    match method {
        // basic.deliver: consumer tag, delivery tag and whether it came before, exchange, routing key
        [0, 60, 0, 60] => &[Short, Fixed(9), Short, Short],
        // basic.get-ok: delivery tag and whether it came before, exchange, routing key
        [0, 60, 0, 71] => &[Fixed(9), Short, Short],
        // basic.return: code, text, exchange, routing key
        [0, 60, 0, 50] => &[Fixed(2), Short, Short, Short],
        // connection.close, channel.close: code, text
        [0, 10, 0, 50] | [0, 20, 0, 40] => &[Fixed(2), Short],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(method: [u8; 4], arguments: &[&[u8]]) -> Vec<u8> {
        let payload = [&method[..], &arguments.concat()].concat();
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[1, 0, 1][..], &size, &payload, &[0xce]].concat()
    }

    /// Where `wrong` stands, `?` stand afterwards, and everything else is as it was.
    #[track_caller]
    fn becomes_readable(method: [u8; 4], before: &[&[u8]], wrong: &[u8], behind: &[u8]) {
        let length = [u8::try_from(wrong.len()).unwrap()];
        let of = |text: &[u8]| {
            frame(method, &[&before.concat()[..], &length, text, behind].concat().chunks(1).collect::<Vec<_>>())
        };
        let mut sent = of(wrong);
        assert!(mend(&mut sent));
        let read: Vec<u8> = wrong.iter().map(|byte| if byte.is_ascii() { *byte } else { b'?' }).collect();
        assert_eq!(sent, of(&read));
        assert!(!mend(&mut sent), "once is enough");
    }

    #[test]
    fn a_routing_key_that_is_no_utf_8_is_delivered_with_question_marks() {
        let tag = [0xff; 9];
        becomes_readable([0, 60, 0, 60], &[b"\x04ctag", &tag, b"\x02ex"], b"\xe9t\xe9", b"");
        becomes_readable([0, 60, 0, 71], &[&tag, b"\x02ex"], b"\xe9t\xe9", &[0xff; 4]);
        becomes_readable([0, 60, 0, 50], &[&[0xff; 2], b"\x02no", b"\x02ex"], b"\xe9t\xe9", b"");
    }

    #[test]
    fn an_explanation_that_was_cut_inside_a_character_is_readable() {
        becomes_readable([0, 20, 0, 40], &[&[0xff; 2]], b"no queue 'gr\xc3", &[0xff; 4]);
        becomes_readable([0, 10, 0, 50], &[&[0xff; 2]], b"no queue 'gr\xc3", &[0xff; 4]);
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        for mut sent in [
            frame([0, 60, 0, 60], &[b"\x04ctag", &[0xff; 9], b"\x02ex", "\x06größe".as_bytes()]),
            frame([0, 60, 0, 80], &[&[0xff; 9]]),
            frame([0, 60, 0, 60], &[b"\xff\xff"]),
            vec![1, 0, 1, 0, 0, 0, 0, 0xce],
            Vec::new(),
        ] {
            let before = sent.clone();
            assert!(!mend(&mut sent));
            assert_eq!(sent, before);
        }
    }
}
