//! What is found at the path before anything is written: not a byte, not a `-wal` or `-shm` beside it.
//!
//! The file is opened as immutable, which takes no lock and creates nothing. Only where a `-wal` with content lies beside
//! it (another process has the file open, or one was killed) do the checks read through it, as its content is part of
//! the database; SQLite may then create the `-shm` index, which holds no data. A `-journal` with content is an
//! unfinished transaction of another program: SQLite rolls it back when the file is opened, and the checks follow.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, SqliteConnection};

use crate::error::Fault;
use crate::schema;

/// The whole file is checked for damage up to this size; beyond it only its header, the schema and the small tables,
/// since a start must not read gigabytes. Damage found later ends the operation that met it, as incompatible.
pub(crate) const CHECKED_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A peer that is creating or checkpointing the file can make it look damaged for a moment.
const LOOKS_MAX: u32 = 10;
const LOOK_AGAIN: Duration = Duration::from_millis(20);

const HEADER: usize = 100;
const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Refuses a path where no store can be opened or created.
pub(crate) async fn examine(path: &Path) -> Result<(), Fault> {
    let mut look = 0;
    loop {
        let before = Stamp::of(path);
        let seen = examine_once(path).await;
        look += 1;
        if seen.is_ok() || look == LOOKS_MAX || (before == Stamp::of(path) && before.is_quiet()) {
            return seen;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn examine_once(path: &Path) -> Result<(), Fault> {
    let length = match fs::metadata(path) {
        Ok(found) if found.is_file() => found.len(),
        Ok(_) => return Err(Fault::configuration(format!("{} is not a file", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return examine_absent(path),
        Err(error) => return Err(Fault::configuration(format!("{}: {error}", path.display()))),
    };
    // Opened for writing without creating or truncating: also root is refused by a read-only mount or attribute.
    let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        Fault::configuration(format!(
            "{} cannot be written ({error}): let this process write it and its folder",
            path.display()
        ))
    })?;
    if length == 0 {
        return refuse_lone_wal(path);
    }
    check_header(path, &mut file)?;
    drop(file);
    if has_content(&beside(path, "-journal")) {
        return Ok(());
    }
    let through_wal = has_content(&beside(path, "-wal"));
    let options = SqliteConnectOptions::new().filename(path).read_only(true).immutable(!through_wal);
    let mut connection = options.connect().await.map_err(|error| Fault::from(error).at_open(path))?;
    let checked = check_content(&mut connection, length).await.map_err(|fault| fault.at_open(path));
    connection.close().await.map_err(|error| Fault::from(error).at_open(path))?;
    checked
}

/// Shape and damage, on any connection. Run again inside the transaction that migrates, where nobody can interfere.
async fn check_content(connection: &mut SqliteConnection, length: u64) -> Result<(), Fault> {
    let found = schema::inspect(connection).await?;
    let checks: &[&'static str] = match found {
        _ if length <= CHECKED_BYTES_MAX => &["PRAGMA quick_check(1)"],
        Some(_) => &["PRAGMA quick_check(hapax_meta)", "PRAGMA quick_check(hapax_consumer)"],
        None => &[],
    };
    for check in checks {
        let said: Vec<String> = sqlx::query_scalar(*check).fetch_all(&mut *connection).await?;
        if said != ["ok"] {
            return Err(Fault::incompatible(format!(
                "the database is damaged ({}): restore it from a backup; hapax does not create it anew",
                said.join("; ")
            )));
        }
    }
    Ok(())
}

fn examine_absent(path: &Path) -> Result<(), Fault> {
    match path.parent() {
        Some(folder) if folder.is_dir() => refuse_lone_wal(path),
        Some(folder) => Err(Fault::configuration(format!("there is no folder {}: create it", folder.display()))),
        None => Err(Fault::configuration(format!("{} is no path of a file", path.display()))),
    }
}

/// A new database at this path would make SQLite delete the WAL of the one that was there.
fn refuse_lone_wal(path: &Path) -> Result<(), Fault> {
    let wal = beside(path, "-wal");
    if !has_content(&wal) {
        return Ok(());
    }
    Err(Fault::incompatible(format!(
        "{} is missing or empty, but {} holds data of it: put the database back, or move the WAL away",
        path.display(),
        wal.display()
    )))
}

fn check_header(path: &Path, file: &mut File) -> Result<(), Fault> {
    let mut header = [0; HEADER];
    let read = file.read_exact(&mut header);
    if header.get(..16) != Some(MAGIC.as_slice()) {
        return Err(Fault::incompatible(format!("{} is not an SQLite database", path.display())));
    }
    let page_size = match u16::from_be_bytes([header[16], header[17]]) {
        1 => 65_536,
        size => u32::from(size),
    };
    if read.is_err() || page_size < 512 || !page_size.is_power_of_two() {
        return Err(Fault::incompatible(format!("{} has a damaged header: restore it from a backup", path.display())));
    }
    Ok(())
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn has_content(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.len() > 0)
}

/// Tells whether somebody worked on the files while they were looked at.
#[derive(Debug, PartialEq, Eq)]
struct Stamp([Option<(u64, Option<SystemTime>)>; 3]);

impl Stamp {
    fn of(path: &Path) -> Self {
        let seen = |path: &Path| fs::metadata(path).ok().map(|found| (found.len(), found.modified().ok()));
        Self([seen(path), seen(&beside(path, "-wal")), seen(&beside(path, "-journal"))])
    }

    /// Neither a WAL nor a journal: nobody is at work.
    fn is_quiet(&self) -> bool {
        let empty = |file: &Option<(u64, _)>| file.as_ref().is_none_or(|(length, _)| *length == 0);
        empty(&self.0[1]) && empty(&self.0[2])
    }
}
