//! One content header frame, looked through without recursion and mended where lapin would not survive it.
//!
//! What is mended bears a [`MARK`], so that the message is set aside and never taken for what its sender meant.

/// The most levels of arrays and tables in one another; what is deeper becomes bytes.
pub(super) const LEVELS_MAX: usize = 32;
/// The header of a message that was changed on its way in; its value says why.
pub(crate) const MARK: &str = "hapax-screened";

/// Type, channel and size of a frame.
pub(super) const HEAD_BYTES: usize = 7;
/// Class, weight, size of the body, flags.
const FIXED_BYTES: usize = 14;
/// In the flags: there is a table of headers.
const HAS_TABLE: u16 = 1 << 13;

/// The properties of `basic` in the order of their flags, from the highest on.
const PROPERTIES: [Property; 14] = {
    use Property::{Fixed, Short, Table};
    // content type and encoding, headers, delivery mode, priority, correlation id, reply to, expiration, message id, timestamp,
    // type, user id, app id, cluster id
    [Short, Short, Table, Fixed(1), Fixed(1), Short, Short, Short, Short, Fixed(8), Short, Short, Short, Short]
};

#[derive(Clone, Copy)]
enum Property {
    Short,
    Fixed(usize),
    Table,
}

/// It is not as AMQP says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// What had to be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    nested: bool,
    pub(super) text: bool,
    large: bool,
}

/// The frame in its place, or another in place of it: where values are nested too deeply, where a name or a property is no
/// UTF-8, and where it is larger than `bytes_max`, since RabbitMQ adds headers of its own and looks at no limit when it delivers.
pub(super) fn mend(frame: &mut [u8], bytes_max: usize) -> Result<Option<Vec<u8>>, Malformed> {
    let (mut changed, mut parts) = (Changed::default(), Parts::default());
    let end = frame.len().checked_sub(1).ok_or(Malformed)?;
    let mut cursor = Cursor { bytes: frame, at: HEAD_BYTES, changed: &mut changed };
    let flags = cursor.skip(FIXED_BYTES, end).map(|fixed| u16::from_be_bytes([fixed[12], fixed[13]]))?;
    for (at, property) in PROPERTIES.iter().enumerate() {
        if at == 2 {
            parts.before = HEAD_BYTES + FIXED_BYTES..cursor.at;
        }
        if flags & (1 << (15 - at)) != 0 {
            match property {
                Property::Short => cursor.short(end)?,
                Property::Fixed(bytes) => drop(cursor.skip(*bytes, end)?),
                Property::Table => {
                    let table_end = cursor.length(end)?;
                    while cursor.at < table_end {
                        let from = cursor.at;
                        cursor.short(table_end)?;
                        cursor.value(table_end)?;
                        parts.entries.push(from..cursor.at);
                    }
                }
            }
        }
        if at == 2 {
            parts.behind = cursor.at..end;
        }
    }
    // The two lowest flags mean nothing, to RabbitMQ and to lapin.
    if cursor.at != end {
        return Err(Malformed);
    }
    changed.large = frame.len() > bytes_max;
    if changed == Changed::default() {
        return Ok(None);
    }
    if changed.large {
        parts.leave_out_servers(frame, bytes_max);
        if !changed.nested && !changed.text && parts.bytes(0) <= bytes_max {
            return Ok(Some(parts.together(frame, flags, &[])));
        }
    }
    Ok(Some(parts.marked(frame, flags, changed, bytes_max)))
}

/// A frame taken apart: the properties before the table, the entries of the table, what is behind it.
#[derive(Default)]
struct Parts {
    before: std::ops::Range<usize>,
    entries: Vec<std::ops::Range<usize>>,
    behind: std::ops::Range<usize>,
}

impl Parts {
    /// So large is the frame with a mark of this size.
    fn bytes(&self, mark: usize) -> usize {
        let table: usize = self.entries.iter().map(ExactSizeIterator::len).sum();
        HEAD_BYTES + FIXED_BYTES + self.before.len() + 4 + table + mark + self.behind.len() + 1
    }

    /// Without what RabbitMQ wrote itself, as far as that is needed: what its sender wrote was sound, and may have been handled.
    fn leave_out_servers(&mut self, frame: &[u8], bytes_max: usize) {
        let is_count = |name: &[u8]| name == b"x-delivery-count";
        let is_history = |name: &[u8]| {
            name == b"x-death"
                || name == b"x-acquired-count"
                || name.starts_with(b"x-first-death-")
                || name.starts_with(b"x-last-death-")
        };
        for is_left_out in [is_history as fn(&[u8]) -> bool, is_count] {
            if self.bytes(0) > bytes_max {
                self.entries.retain(|entry| {
                    let entry = &frame[entry.clone()];
                    !entry.get(1..=usize::from(entry[0])).is_some_and(is_left_out)
                });
            }
        }
    }

    /// Put together again with a mark; without its largest entries where all would be too large.
    fn marked(mut self, frame: &[u8], flags: u16, changed: Changed, bytes_max: usize) -> Vec<u8> {
        let mark = mark(changed);
        while self.bytes(mark.len()) > bytes_max {
            let largest = (0..self.entries.len()).max_by_key(|at| self.entries[*at].len());
            let Some(largest) = largest else { break };
            self.entries.remove(largest);
        }
        self.together(frame, flags, &mark)
    }

    fn together(self, frame: &[u8], flags: u16, mark: &[u8]) -> Vec<u8> {
        let bytes = self.bytes(mark.len());
        let table: usize = self.entries.iter().map(ExactSizeIterator::len).sum();
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
        let mut out = Vec::with_capacity(bytes);
        out.extend_from_slice(&frame[..3]);
        out.extend(length(bytes - HEAD_BYTES - 1));
        out.extend_from_slice(&frame[HEAD_BYTES..HEAD_BYTES + FIXED_BYTES - 2]);
        out.extend((flags | HAS_TABLE).to_be_bytes());
        out.extend_from_slice(&frame[self.before]);
        out.extend(length(table + mark.len()));
        self.entries.into_iter().for_each(|entry| out.extend_from_slice(&frame[entry]));
        out.extend_from_slice(mark);
        out.extend_from_slice(&frame[self.behind.start..]);
        out
    }
}

/// The mark as an entry of the table.
fn mark(changed: Changed) -> Vec<u8> {
    let why: Vec<&str> = [(changed.nested, "nested"), (changed.text, "text"), (changed.large, "large")]
        .into_iter()
        .filter_map(|(is, word)| is.then_some(word))
        .collect();
    let why = why.join(" ");
    let length = |bytes: usize| u8::try_from(bytes).unwrap_or(u8::MAX);
    let mut entry = vec![length(MARK.len())];
    entry.extend_from_slice(MARK.as_bytes());
    entry.extend([b'S', 0, 0, 0, length(why.len())]);
    entry.extend_from_slice(why.as_bytes());
    entry
}

/// Goes through a frame once, from front to back, and mends as it goes.
pub(super) struct Cursor<'a> {
    pub(super) bytes: &'a mut [u8],
    pub(super) at: usize,
    pub(super) changed: &'a mut Changed,
}

impl Cursor<'_> {
    pub(super) fn skip(&mut self, bytes: usize, end: usize) -> Result<&mut [u8], Malformed> {
        let to = self.at.checked_add(bytes).filter(|to| *to <= end).ok_or(Malformed)?;
        let skipped = &mut self.bytes[self.at..to];
        self.at = to;
        Ok(skipped)
    }

    /// A length of four bytes; answers where what it measures ends.
    fn length(&mut self, end: usize) -> Result<usize, Malformed> {
        let length = self.skip(4, end)?;
        let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]);
        let to = usize::try_from(length).ok().and_then(|length| self.at.checked_add(length));
        to.filter(|to| *to <= end).ok_or(Malformed)
    }

    /// A short string, which lapin takes as UTF-8 only.
    pub(super) fn short(&mut self, end: usize) -> Result<(), Malformed> {
        let length = usize::from(self.skip(1, end)?[0]);
        let text = self.skip(length, end)?;
        let mut from = 0;
        let mut mended = false;
        while let Err(wrong) = std::str::from_utf8(&text[from..]) {
            let start = from + wrong.valid_up_to();
            from = wrong.error_len().map_or(text.len(), |bytes| start + bytes);
            text[start..from].fill(b'?');
            mended = true;
        }
        self.changed.text |= mended;
        Ok(())
    }

    /// A value, with everything in it.
    fn value(&mut self, end: usize) -> Result<(), Malformed> {
        // The ends of the arrays and tables around this place, and whether they have names.
        let mut around: Vec<(usize, bool)> = Vec::new();
        loop {
            let end = around.last().map_or(end, |(end, _)| *end);
            let tag_at = self.at;
            let tag = self.skip(1, end)?[0];
            match tag {
                b'A' | b'F' => {
                    let inner = self.length(end)?;
                    if around.len() < LEVELS_MAX {
                        around.push((inner, tag == b'F'));
                    } else {
                        // A length and bytes, as an array and a table are.
                        self.bytes[tag_at] = b'x';
                        self.changed.nested = true;
                        self.at = inner;
                    }
                }
                b'S' | b'x' => self.at = self.length(end)?,
                b't' | b'b' | b'B' => drop(self.skip(1, end)?),
                b's' | b'U' | b'u' => drop(self.skip(2, end)?),
                b'I' | b'i' | b'f' => drop(self.skip(4, end)?),
                b'D' => drop(self.skip(5, end)?),
                b'L' | b'l' | b'd' | b'T' => drop(self.skip(8, end)?),
                b'V' => {}
                _ => return Err(Malformed),
            }
            // Out of everything that ends here, then on to the next value.
            while around.pop_if(|(end, _)| *end == self.at).is_some() {}
            let Some((end, named)) = around.last().copied() else { return Ok(()) };
            if named {
                self.short(end)?;
            }
        }
    }
}

#[cfg(test)]
mod tests;
