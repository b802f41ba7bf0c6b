//! Lines of a file or of standard input, read on a thread of their own: in bounded memory, however long a line is.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use tokio::sync::mpsc;

/// Lines read ahead.
const AHEAD_MAX: usize = 256;

/// One line that is not blank, without its end.
#[derive(Debug)]
pub(crate) struct Line {
    /// From 1, blank lines counted.
    pub(crate) number: u64,
    /// The first bytes of it where it is longer than the bound; longer than the bound, so that it shows.
    pub(crate) bytes: Vec<u8>,
}

/// Opens a file, or standard input for `-`, and reads until its end, an error, or until nobody listens any more.
///
/// The thread is not joined: it may wait for standard input when the program ends.
pub(crate) fn read(events: &Path, bytes_max: usize) -> Result<mpsc::Receiver<io::Result<Line>>, String> {
    let mut source: Box<dyn BufRead + Send> = if events == Path::new("-") {
        Box::new(BufReader::new(io::stdin()))
    } else {
        let cannot = |error| format!("--events {}: {error}", events.display());
        let file = File::open(events).map_err(cannot)?;
        if file.metadata().map_err(cannot)?.is_dir() {
            return Err(format!("--events {} is a folder; give a file, or - for standard input", events.display()));
        }
        Box::new(BufReader::new(file))
    };
    let (lines, receiver) = mpsc::channel(AHEAD_MAX);
    std::thread::spawn(move || {
        for number in 1.. {
            let line = match next(&mut source, bytes_max) {
                Ok(None) => return,
                Ok(Some(bytes)) if bytes.trim_ascii().is_empty() => continue,
                Ok(Some(bytes)) => Ok(Line { number, bytes }),
                Err(error) => Err(error),
            };
            let failed = line.is_err();
            if lines.blocking_send(line).is_err() || failed {
                return;
            }
        }
    });
    Ok(receiver)
}

fn next(source: &mut impl BufRead, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    // With room for the line's end, so that a line of just the bound is told from a longer one.
    let most = bytes_max + 2;
    source.by_ref().take(most as u64).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.pop_if(|last| *last == b'\n').is_some() {
        line.pop_if(|last| *last == b'\r');
    } else if line.len() == most {
        source.skip_until(b'\n')?;
    }
    Ok(Some(line))
}
