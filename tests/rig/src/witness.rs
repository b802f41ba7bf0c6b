//! The witness of effects: reads what workers left where a `kill -9` cannot take it back.
//!
//! Lines: every worker appends to a file of its own, so that a line tells who wrote it; the files are read on every tick,
//! and before anything is written down that must come after them. Rows: read from the table when the run is over.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::Row;

use crate::options::StoreKind;
use crate::scribe::{CONDUCTOR, EffectLine, Life, SOURCE, Scribe};

/// How often files are read.
pub(crate) const TICK: Duration = Duration::from_millis(10);
/// Longest time for one question to a database.
const QUESTION_MAX: Duration = Duration::from_secs(30);

/// Follows the files of all workers.
#[derive(Debug)]
pub(crate) struct Witness {
    scribe: Arc<Scribe>,
    tails: Mutex<Vec<Tail>>,
}

#[derive(Debug)]
struct Tail {
    file: File,
    life: Life,
    /// The begin of a line whose end is not there yet.
    part: Vec<u8>,
    path: PathBuf,
}

impl Witness {
    pub(crate) fn new(scribe: Arc<Scribe>) -> Self {
        Self { scribe, tails: Mutex::default() }
    }

    /// Follows the file that `life` appends to; creates it.
    pub(crate) fn follow(&self, life: Life, path: &Path) -> io::Result<()> {
        self.drain();
        let file = File::options().create(true).append(true).read(true).open(path)?;
        let mut tails = self.tails.lock().expect("nobody panics while holding it");
        tails.retain(|tail| tail.life.worker != life.worker);
        tails.push(Tail { file, life, part: Vec::new(), path: path.to_owned() });
        Ok(())
    }

    /// Writes down every effect that is there by now.
    pub(crate) fn drain(&self) {
        let mut tails = self.tails.lock().expect("nobody panics while holding it");
        for tail in tails.iter_mut() {
            tail.drain(&self.scribe);
        }
    }

    /// A handler began: behind every effect that was there before it.
    pub(crate) fn started(&self, life: Life, id: &str, attempt: u32) {
        self.drain();
        self.scribe.started(life, id, attempt);
    }
}

impl Tail {
    fn drain(&mut self, scribe: &Scribe) {
        if let Err(error) = self.file.read_to_end(&mut self.part) {
            eprintln!("rig: {}: {error}", self.path.display());
        }
        let Some(end) = self.part.iter().rposition(|byte| *byte == b'\n') else { return };
        let rest = self.part.split_off(end + 1);
        for line in std::mem::replace(&mut self.part, rest).split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
        {
            match serde_json::from_slice::<EffectLine>(line) {
                Ok(effect) => scribe.effect(self.life, &effect),
                Err(error) => eprintln!("rig: {} has a line that is no effect: {error}", self.path.display()),
            }
        }
    }
}

/// Reads the table `effects`.
#[derive(Debug)]
pub(crate) enum Table {
    Postgres(sqlx::PgPool),
    Sqlite(sqlx::SqlitePool),
}

impl Table {
    pub(crate) async fn connect(store: StoreKind, url: &str) -> Result<Self, String> {
        let opened = match store {
            StoreKind::Sqlite => sqlx::SqlitePool::connect(&format!("sqlite://{url}")).await.map(Self::Sqlite),
            StoreKind::Postgres | StoreKind::Redis => {
                let options = sqlx::postgres::PgPoolOptions::new().max_connections(1).acquire_timeout(QUESTION_MAX);
                options.connect_lazy(url).map(Self::Postgres)
            }
        };
        opened.map_err(|error| format!("the table effects cannot be read: {error}"))
    }

    /// How many events of the group have a row.
    pub(crate) async fn events(&self, group: &str) -> Result<usize, String> {
        const COUNT: &str = "SELECT count(DISTINCT id) FROM effects WHERE consumer = $1";
        let asked = async {
            match self {
                Self::Postgres(pool) => sqlx::query_scalar::<_, i64>(COUNT).bind(group).fetch_one(pool).await,
                Self::Sqlite(pool) => sqlx::query_scalar::<_, i64>(COUNT).bind(group).fetch_one(pool).await,
            }
        };
        answer(asked).await.map(|count| usize::try_from(count).unwrap_or_default())
    }

    /// Writes down every row.
    pub(crate) async fn read(&self, scribe: &Scribe) -> Result<(), String> {
        const ALL: &str = "SELECT source, id, type FROM effects WHERE consumer = $1";
        let group = &*scribe.group;
        let asked = async {
            let rows: Vec<(String, String, String)> = match self {
                Self::Postgres(pool) => {
                    let rows = sqlx::query(ALL).bind(group).fetch_all(pool).await?;
                    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
                }
                Self::Sqlite(pool) => {
                    let rows = sqlx::query(ALL).bind(group).fetch_all(pool).await?;
                    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
                }
            };
            Ok(rows)
        };
        for (source, id, ty) in answer(asked).await? {
            debug_assert_eq!(source, SOURCE);
            scribe.effect(Life { worker: CONDUCTOR, number: 0 }, &EffectLine { source, id, ty, key: None });
        }
        Ok(())
    }
}

async fn answer<T>(asked: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, String> {
    let answered = tokio::time::timeout(QUESTION_MAX, asked).await;
    let answered = answered.map_err(|_| format!("the table effects did not answer within {QUESTION_MAX:?}"))?;
    answered.map_err(|error| format!("the table effects cannot be read: {error}"))
}
