//! Hot statements: those that run for every event, as text or prepared.
//!
//! To parse and to plan one costs the server several times what running it does. On a connection that hapax keeps it is
//! prepared by SQL (`PREPARE`, `EXECUTE`), since that fits into one message with the settings of its transaction. The
//! name is made of the text, so that no other version, schema or process means another statement by it.

use crate::template::Template;

/// How a hot statement is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As it is.
    Text,
    /// By the name under which it was prepared on this connection.
    Prepared,
}

/// Places of values in the texts of `sql/`, and the types of the parameters that they become.
const PARAMETERS: [(&str, &str); 17] = [
    ("'{{keys}}'", "uuid[]"),
    ("'{{consumers}}'", "integer[]"),
    ("'{{fingerprints}}'", "uuid[]"),
    ("'{{tokens}}'", "uuid[]"),
    ("'{{reopens}}'", "bigint[]"),
    ("'{{fences}}'", "bigint[]"),
    ("'{{known}}'", "integer[]"),
    ("{known_count}", "bigint"),
    ("{lease}", "bigint"),
    ("{count}", "bigint"),
    ("'{key}'", "uuid"),
    ("{consumer}", "integer"),
    ("{fence}", "bigint"),
    ("'{mark}'", "text"),
    ("{next}", "uuid"),
    ("{fingerprint}", "uuid"),
    ("{token}", "uuid"),
];

/// A statement in both forms.
#[derive(Debug)]
pub(crate) struct Hot {
    text: Template,
    execute: Template,
    pub(crate) name: String,
    /// The statement that prepares it.
    pub(crate) prepare: String,
}

impl Hot {
    pub(crate) fn new(sql: &str, constant: &[(&str, &str)]) -> Self {
        let text = Template::new(sql, constant);
        // Guards are for a handler's transaction, where it is sent as text.
        let mut body = text.source().replace("{guard}", "");
        let (mut types, mut values) = (Vec::new(), Vec::new());
        for (place, kind) in PARAMETERS {
            if body.contains(place) {
                types.push(kind);
                values.push(place);
                body = body.replace(place, &format!("${}", types.len()));
            }
        }
        let name = format!("hapax_{:016x}", digest(&body));
        let prepare = format!("PREPARE {name} ({}) AS {body}", types.join(", "));
        let execute = Template::new(&format!("EXECUTE {name} ({})", values.join(", ")), &[]);
        Self { text, execute, name, prepare }
    }

    pub(crate) fn template(&self, form: Form) -> &Template {
        match form {
            Form::Text => &self.text,
            Form::Prepared => &self.execute,
        }
    }
}

/// FNV-1a.
fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prepared_statement_has_parameters_where_its_text_has_values_and_a_name_of_its_own() {
        let of = |schema| Hot::new("SELECT {lease} FROM {schema}.x('{{keys}}'::uuid[]) {guard}", &[("schema", schema)]);
        let hot = of("a");
        assert_eq!(hot.prepare, format!("PREPARE {} (uuid[], bigint) AS SELECT $2 FROM a.x($1::uuid[]) ", hot.name));
        let mut sent = String::new();
        hot.template(Form::Prepared).write(&mut sent, |hole, out| out.push_str(&hole.to_uppercase()));
        assert_eq!(sent, format!("EXECUTE {} ('{{KEYS}}', LEASE)", hot.name));
        assert_ne!(hot.name, of("b").name);
    }
}
