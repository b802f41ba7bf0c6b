//! Our tables: their version, whether those found are ours, and bringing them up to date.
//!
//! Checking only reads. Migrating is asked for by the user, runs in one transaction, and waits for others that do the
//! same at the same time. sqlx's own table of migrations stays the user's.

use std::collections::BTreeMap;

use sqlx::Row;
use sqlx::postgres::PgRow;

use crate::error::Fault;
use crate::line::Lines;
use crate::statements::limits;
use crate::template::{Schema, Template};

/// Version `n` of the schema is what the first `n` of these leave behind.
const MIGRATIONS: [&str; 1] = [include_str!("../migrations/0001_records.sql")];

/// The version of the schema that this version of hapax reads and writes. The tables are public API.
pub const SCHEMA_VERSION: u32 = MIGRATIONS.len() as u32;

/// The oldest server: the sweep reads the table by ranges of blocks, which came with 14.
const SERVER_VERSION_MIN: i32 = 140_000;

/// `hapax` as a number: the mark of our meta table.
const MARK: i64 = 448_311_353_720;

/// How long a migration waits for another's, or for the users of the tables.
const MIGRATE_LOCK_MAX_MS: i64 = 20_000;

const TABLES: [&str; 3] = ["hapax_meta", "hapax_consumer", "hapax_record"];

/// Name, type, whether it is NOT NULL.
type Column = (&'static str, &'static str, bool);

const META: &[Column] = &[("name", "text", true), ("value", "bigint", true)];
const CONSUMER: &[Column] = &[("id", "integer", true), ("name", "text", true), ("retention", "bigint", true)];
const RECORD: &[Column] = &[
    ("time", "bigint", true),
    ("fence", "bigint", true),
    ("consumer", "integer", true),
    ("attempt", "integer", true),
    ("crashes", "integer", true),
    ("state", "smallint", true),
    ("key", "uuid", true),
    ("fingerprint", "uuid", true),
    ("token", "uuid", false),
    ("first", "bigint", false),
    ("doomed", "bigint", false),
    ("reason", "text", false),
    ("trouble_id", "text", false),
    ("trouble_error", "text", false),
];

/// The columns of a table, and the keys by which its rows are found: the first is the primary one.
fn expected(table: &str) -> (&'static [Column], &'static [&'static str]) {
    match table {
        "hapax_meta" => (META, &["name"]),
        "hapax_consumer" => (CONSUMER, &["id", "name"]),
        _ => (RECORD, &["key,consumer"]),
    }
}

/// Reads which version of our tables is there: `None` where there is none of them. Writes nothing.
pub(crate) async fn inspect(lines: &Lines, schema: &Schema) -> Result<Option<u32>, Fault> {
    let name = schema.name();
    let tables = format!(
        "SELECT c.relname::text, c.relkind::text, c.relpersistence::text, c.relrowsecurity, a.attname::text, \
         format_type(a.atttypid, a.atttypmod), a.attnotnull \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
         WHERE n.nspname = '{name}' AND c.relname IN ('hapax_meta', 'hapax_consumer', 'hapax_record'); \
         SELECT c.relname::text, \
         (SELECT string_agg(a.attname::text, ',' ORDER BY k.place) FROM unnest(i.indkey) WITH ORDINALITY AS k (number, place) \
          JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number) \
         FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indrelid \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE n.nspname = '{name}' AND c.relname IN ('hapax_meta', 'hapax_consumer', 'hapax_record') \
         AND i.indisunique AND i.indisvalid AND i.indpred IS NULL"
    );
    let replies = lines.ask(tables).await?;
    let [columns, keys] = replies.as_slice() else { return Err(Fault::incompatible("the catalog gave no answer")) };
    let mut found: BTreeMap<String, Table> = BTreeMap::new();
    for row in columns {
        found.entry(row.try_get(0)?).or_default().add(row)?;
    }
    for row in keys {
        let table: String = row.try_get(0)?;
        if let (Some(table), Some(key)) = (found.get_mut(&table), row.try_get(1)?) {
            table.keys.push(key);
        }
    }
    if found.is_empty() {
        return Ok(None);
    }
    // The meta table first: its shape never changes, and without its version the others cannot be judged.
    compare(TABLES[0], found.get(TABLES[0]), schema)?;
    let version = version(lines, schema).await?;
    for table in TABLES {
        compare(table, found.get(table), schema)?;
    }
    Ok(Some(version))
}

/// What is known of one table.
#[derive(Debug, Default)]
struct Table {
    /// Why it cannot be one of ours, whatever its columns.
    unfit: Option<&'static str>,
    columns: Vec<(String, String, bool)>,
    keys: Vec<String>,
}

impl Table {
    fn add(&mut self, row: &PgRow) -> Result<(), Fault> {
        let (kind, persistence): (&str, &str) = (row.try_get(1)?, row.try_get(2)?);
        self.unfit = match (kind, persistence, row.try_get(3)?) {
            ("r", "p", false) => None,
            ("r", "u", _) => Some("is UNLOGGED, so a crash of the server empties it: ALTER TABLE .. SET LOGGED"),
            ("r", _, true) => Some("has row security, which hides records: ALTER TABLE .. DISABLE ROW LEVEL SECURITY"),
            _ => Some("is not an ordinary table"),
        };
        if let Some(column) = row.try_get(4)? {
            self.columns.push((column, row.try_get(5)?, row.try_get(6)?));
        }
        Ok(())
    }
}

fn compare(name: &str, found: Option<&Table>, schema: &Schema) -> Result<(), Fault> {
    let place = schema.name();
    let refuse = |what: String| {
        Err(Fault::incompatible(format!(
            "{what}: the table is damaged or not hapax's; rename it, or give hapax another schema"
        )))
    };
    let Some(found) = found else {
        return refuse(format!("table {place}.{name} is missing beside other tables of hapax"));
    };
    if let Some(unfit) = found.unfit {
        return Err(Fault::incompatible(format!("{place}.{name} {unfit}")));
    }
    let (columns, keys) = expected(name);
    for (column, wanted, not_null) in columns {
        match found.columns.iter().find(|(name, ..)| name == column) {
            Some((_, is, must)) if is == wanted && must == not_null => {}
            Some((_, is, must)) => {
                let null = |not_null: bool| if not_null { " NOT NULL" } else { "" };
                let (is_null, wanted_null) = (null(*must), null(*not_null));
                return refuse(format!(
                    "table {place}.{name} has a column {column} of another shape ({is}{is_null}, not {wanted}{wanted_null})"
                ));
            }
            None => return refuse(format!("table {place}.{name} has no column {column}")),
        }
    }
    if let Some((other, ..)) = found.columns.iter().find(|(name, ..)| columns.iter().all(|(column, ..)| name != column))
    {
        return refuse(format!("table {place}.{name} has a column {other} that hapax does not know"));
    }
    for key in keys {
        if !found.keys.iter().any(|found| found == key) {
            return refuse(format!("table {place}.{name} has no unique index on ({key})"));
        }
    }
    Ok(())
}

async fn version(lines: &Lines, schema: &Schema) -> Result<u32, Fault> {
    let place = schema.quoted();
    let meta = format!(
        "SELECT (SELECT value FROM {place}.hapax_meta WHERE name = 'hapax'), \
         (SELECT value FROM {place}.hapax_meta WHERE name = 'schema')"
    );
    let replies = lines.ask(meta).await?;
    let row = replies.first().and_then(|rows| rows.first());
    let row = row.ok_or_else(|| Fault::incompatible("table hapax_meta gave no answer"))?;
    if row.try_get::<Option<i64>, _>(0)? != Some(MARK) {
        return Err(Fault::incompatible("table hapax_meta does not bear hapax's mark: it is damaged or not hapax's"));
    }
    check_version(row.try_get(1)?)
}

/// Refuses a schema that another version of hapax wrote.
pub(crate) fn check_version(found: Option<i64>) -> Result<u32, Fault> {
    let Some(found) = found else {
        return Err(Fault::incompatible("table hapax_meta holds no schema version: it is damaged or not hapax's"));
    };
    if found > i64::from(SCHEMA_VERSION) {
        return Err(Fault::incompatible(format!(
            "written by a newer hapax (schema {found}, this one knows {SCHEMA_VERSION}): upgrade hapax-postgres"
        )));
    }
    u32::try_from(found)
        .ok()
        .filter(|version| *version > 0)
        .ok_or_else(|| Fault::incompatible(format!("table hapax_meta holds the schema version {found}: it is damaged")))
}

/// Creates our tables or brings them up to date. Several may do so at once: one does it, the others find it done.
pub(crate) async fn migrate(lines: &Lines, schema: &Schema) -> Result<(), Fault> {
    // One that begins while another is at work sees all of its tables or none, but may have looked before it: the
    // version is asked again under the lock.
    let from = inspect(lines, schema).await?.unwrap_or_default();
    if from == SCHEMA_VERSION {
        return Ok(());
    }
    let (place, name) = (schema.quoted(), schema.name());
    let mut steps = String::new();
    for migration in &MIGRATIONS[from as usize..] {
        Template::new(migration, &[("schema", &place)]).write(&mut steps, |_, _| {});
        steps.push(' ');
    }
    let unchanged = match from {
        0 => format!("to_regclass('{place}.hapax_meta') IS NULL"),
        version => format!("(SELECT value FROM {place}.hapax_meta WHERE name = 'schema') = {version}"),
    };
    // DO runs its text as one statement of this transaction; the quotes of the steps are doubled in it.
    let message = format!(
        "{} SELECT pg_advisory_xact_lock(hashtextextended('hapax migrate {name}', 0)); \
         DO $hapax$ BEGIN \
         IF NOT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = '{name}') THEN CREATE SCHEMA {place}; END IF; \
         IF {unchanged} THEN {steps} END IF; \
         END $hapax$",
        limits(MIGRATE_LOCK_MAX_MS, 2 * MIGRATE_LOCK_MAX_MS)
    );
    lines.ask(message).await?;
    match inspect(lines, schema).await? {
        Some(SCHEMA_VERSION) => Ok(()),
        _ => Err(Fault::unavailable("the tables were changed while they were migrated: try again")),
    }
}

/// Refuses a server that cannot carry the store, before anything is read from the tables.
pub(crate) async fn check_server(lines: &Lines) -> Result<(), Fault> {
    let about = "SELECT current_setting('server_version_num')::integer, current_setting('server_version'), \
        current_setting('server_encoding'), pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean";
    let replies = lines.ask(about.to_owned()).await?;
    let row = replies.first().and_then(|rows| rows.first());
    let row = row.ok_or_else(|| Fault::incompatible("the server does not tell its version"))?;
    if row.try_get::<i32, _>(0)? < SERVER_VERSION_MIN {
        let version: &str = row.try_get(1)?;
        return Err(Fault::configuration(format!("PostgreSQL {version} is too old: hapax needs 14 or later")));
    }
    let encoding: &str = row.try_get(2)?;
    if encoding != "UTF8" {
        return Err(Fault::configuration(format!(
            "the database is in {encoding}, which cannot hold every text: create one with ENCODING 'UTF8'"
        )));
    }
    if row.try_get(3)? {
        return Err(read_only());
    }
    Ok(())
}

/// Whether the server itself was told by sqlx how to write floating-point numbers: a pooler between the two tells it
/// nothing at its start that it does not know.
pub(crate) async fn is_direct(lines: &Lines) -> Result<bool, Fault> {
    let about = "SELECT EXISTS (SELECT FROM pg_catalog.pg_settings \
        WHERE name = 'extra_float_digits' AND source = 'client')";
    let replies = lines.ask(about.to_owned()).await?;
    let row = replies.first().and_then(|rows| rows.first());
    Ok(row.map(|row| row.try_get(0)).transpose()?.unwrap_or_default())
}

pub(crate) fn read_only() -> Fault {
    Fault::configuration(
        "the server is a replica or read-only, and a store writes: give the pool the address of the primary",
    )
}

/// Refuses a role that lacks a right, naming all that it lacks.
pub(crate) async fn check_rights(lines: &Lines, schema: &Schema) -> Result<(), Fault> {
    let place = schema.quoted();
    let rights = format!(
        "SELECT current_user::text, t.name, r.name FROM unnest('{{{}}}'::text[]) AS t (name), \
         unnest('{{SELECT,INSERT,UPDATE,DELETE}}'::text[]) AS r (name) \
         WHERE NOT has_table_privilege('{place}.' || t.name, r.name)",
        TABLES.join(",")
    );
    let replies = lines.ask(rights).await?;
    let missing = replies.first().map(Vec::as_slice).unwrap_or_default();
    let Some(first) = missing.first() else { return Ok(()) };
    let role: &str = first.try_get(0)?;
    let mut lacking = Vec::new();
    for row in missing {
        let (table, right): (&str, &str) = (row.try_get(1)?, row.try_get(2)?);
        lacking.push(format!("{right} on {table}"));
    }
    Err(Fault::configuration(format!(
        "role {role} lacks {}: GRANT SELECT, INSERT, UPDATE, DELETE ON {} TO {role}",
        lacking.join(", "),
        TABLES.map(|table| format!("{place}.{table}")).join(", ")
    )))
}
