//! Our tables: their versions, whether those found are ours, and bringing them up to date.
//!
//! The shape that is expected is not written down a second time: the migrations are run in an empty database in memory
//! and compared with what is found. `PRAGMA user_version`, `application_id` and `_sqlx_migrations` stay the user's.

use std::collections::BTreeMap;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection};

use crate::error::Fault;

/// Version `n` of the schema is what the first `n` of these leave behind.
const MIGRATIONS: [&str; 1] = [include_str!("../migrations/0001_records.sql")];

/// The version of the schema that this version of hapax reads and writes. The tables are public API.
pub const SCHEMA_VERSION: u32 = MIGRATIONS.len() as u32;

/// `hapax` as a number: the mark of our meta table.
const MARK: i64 = 448_311_353_720;

/// What is known of one table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Table {
    kind: String,
    columns: BTreeMap<String, Column>,
    sql: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Column {
    declared: String,
    not_null: bool,
    key_part: i64,
}

type Shape = BTreeMap<String, Table>;

/// Reads which version of our tables is there: `None` where there is none of them. Writes nothing.
pub(crate) async fn inspect(connection: &mut SqliteConnection) -> Result<Option<u32>, Fault> {
    let found = shape(connection).await?;
    if found.is_empty() {
        return Ok(None);
    }
    let newest = expected(SCHEMA_VERSION).await?;
    // The meta table first: its shape never changes, and without its version the others cannot be judged.
    compare("hapax_meta", &found, &newest)?;
    let version = version(connection).await?;
    let expected = expected(version).await?;
    for name in expected.keys() {
        compare(name, &found, &expected)?;
    }
    Ok(Some(version))
}

/// Creates our tables or brings them up to date, inside the transaction that is open.
pub(crate) async fn migrate(connection: &mut SqliteConnection) -> Result<(), Fault> {
    let from = inspect(connection).await?.unwrap_or_default();
    for migration in &MIGRATIONS[from as usize..] {
        sqlx::raw_sql(*migration).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Refuses a schema that another version of hapax wrote since.
pub(crate) fn check_version(found: Option<i64>) -> Result<u32, Fault> {
    let Some(found) = found else {
        return Err(Fault::incompatible("table hapax_meta holds no schema version: it is damaged or not hapax's"));
    };
    if found > i64::from(SCHEMA_VERSION) {
        return Err(Fault::incompatible(format!(
            "written by a newer hapax (schema {found}, this one knows {SCHEMA_VERSION}): upgrade hapax-sqlite"
        )));
    }
    u32::try_from(found)
        .ok()
        .filter(|version| *version > 0)
        .ok_or_else(|| Fault::incompatible(format!("table hapax_meta holds the schema version {found}: it is damaged")))
}

async fn version(connection: &mut SqliteConnection) -> Result<u32, Fault> {
    let meta = "SELECT (SELECT value FROM hapax_meta WHERE name = 'hapax'), \
        (SELECT value FROM hapax_meta WHERE name = 'schema')";
    let row = sqlx::query(meta).fetch_one(connection).await?;
    if row.try_get::<Option<i64>, _>(0)? != Some(MARK) {
        return Err(Fault::incompatible("table hapax_meta does not bear hapax's mark: it is damaged or not hapax's"));
    }
    check_version(row.try_get(1)?)
}

async fn expected(version: u32) -> Result<Shape, Fault> {
    let mut memory = SqliteConnectOptions::new().in_memory(true).connect().await?;
    for migration in &MIGRATIONS[..version as usize] {
        sqlx::raw_sql(*migration).execute(&mut memory).await?;
    }
    let shape = shape(&mut memory).await?;
    memory.close().await?;
    Ok(shape)
}

async fn shape(connection: &mut SqliteConnection) -> Result<Shape, Fault> {
    let ours = "SELECT lower(m.name), m.type, m.sql, lower(c.name), upper(c.type), c.\"notnull\", c.pk \
        FROM sqlite_schema m LEFT JOIN pragma_table_xinfo(m.name) c \
        WHERE lower(m.name) IN ('hapax_meta', 'hapax_consumer', 'hapax_open', 'hapax_record')";
    let mut shape = Shape::new();
    for row in sqlx::query(ours).fetch_all(connection).await? {
        let table: &mut Table = shape.entry(row.try_get(0)?).or_default();
        table.kind = row.try_get(1)?;
        table.sql = normal(row.try_get::<Option<&str>, _>(2)?.unwrap_or_default());
        if let Some(name) = row.try_get(3)? {
            let column = Column {
                declared: row.try_get(4)?,
                not_null: row.try_get::<i64, _>(5)? != 0,
                key_part: row.try_get(6)?,
            };
            table.columns.insert(name, column);
        }
    }
    Ok(shape)
}

/// SQL without what does not matter: case, white space, quotes of names.
fn normal(sql: &str) -> String {
    sql.chars().filter(|c| !c.is_whitespace() && !matches!(c, '"' | '`')).flat_map(char::to_lowercase).collect()
}

fn compare(name: &str, found: &Shape, expected: &Shape) -> Result<(), Fault> {
    let refuse = |what: String| {
        Err(Fault::incompatible(format!(
            "{what}: the table is damaged or not hapax's; rename it, or give hapax another file"
        )))
    };
    let (Some(found), Some(expected)) = (found.get(name), expected.get(name)) else {
        return refuse(format!("table {name} is missing beside other tables of hapax"));
    };
    if found.kind != expected.kind {
        return refuse(format!("{name} is a {} where hapax keeps a table", found.kind));
    }
    for (column, wanted) in &expected.columns {
        match found.columns.get(column) {
            Some(is) if is == wanted => {}
            Some(is) => {
                return refuse(format!("table {name} has a column {column} of another shape ({is}, not {wanted})"));
            }
            None => return refuse(format!("table {name} has no column {column}")),
        }
    }
    if let Some(other) = found.columns.keys().find(|column| !expected.columns.contains_key(*column)) {
        return refuse(format!("table {name} has a column {other} that hapax does not know"));
    }
    if found.sql != expected.sql {
        return refuse(format!("table {name} has other constraints or options than hapax gives it"));
    }
    Ok(())
}

impl std::fmt::Display for Column {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let null = if self.not_null { " NOT NULL" } else { "" };
        let key = if self.key_part > 0 { format!(" as key part {}", self.key_part) } else { String::new() };
        write!(f, "{}{null}{key}", self.declared)
    }
}
