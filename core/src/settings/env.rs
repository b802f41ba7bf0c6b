//! Settings from environment variables: `HAPAX_LEASE=45s`.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::Settings;
use crate::fault::{BuildError, Fault};

/// Names closer than this are taken for misspellings (Jaro-Winkler, 0 to 1).
const NEAR: f64 = 0.75;

impl Settings {
    /// The environment's settings: `HAPAX_LEASE=45s`, `HAPAX_CONCURRENCY=16` for the prefix `HAPAX`; what is not there
    /// keeps its default.
    ///
    /// A variable with the prefix that is no setting is a fault that names the nearest one, so keep a prefix for hapax
    /// alone. Every fault is told at once.
    pub fn from_env(prefix: &str) -> Result<Self, BuildError> {
        // A name that is not Unicode is no setting of ours; a value that is not is told as it reads.
        let vars = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())));
        Self::from_vars(prefix, vars)
    }

    /// As [`from_env`](Self::from_env), from any names and values.
    ///
    /// ```
    /// use std::time::Duration;
    /// use hapax::Settings;
    ///
    /// let settings = Settings::from_vars("HAPAX", [("HAPAX_LEASE", "45s"), ("PATH", "/bin")])?;
    /// assert_eq!(settings.lease, Duration::from_secs(45));
    ///
    /// let error = Settings::from_vars("HAPAX", [("HAPAX_LEESE", "45s")]).unwrap_err();
    /// assert!(error.to_string().contains("HAPAX_LEASE"));
    /// # Ok::<(), hapax::BuildError>(())
    /// ```
    pub fn from_vars<N: AsRef<str>, V: AsRef<str>>(
        prefix: &str,
        vars: impl IntoIterator<Item = (N, V)>,
    ) -> Result<Self, BuildError> {
        let (mut known, mut faults) = (Map::new(), Vec::new());
        for (variable, text) in vars {
            let variable = variable.as_ref();
            let Some(name) = variable.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('_')) else { continue };
            match Self::NAMES.iter().find(|setting| setting.to_uppercase() == name) {
                Some(setting) => match read(setting, text.as_ref()) {
                    Ok(value) => drop(known.insert((*setting).to_owned(), value)),
                    Err(why) => faults.push(invalid(variable, &why)),
                },
                None => faults.push(unknown(prefix, variable, name)),
            }
        }
        faults.sort_by(|a, b| a.what.cmp(&b.what));
        BuildError::check(faults)?;
        // Each was read alone above, so together they read as well.
        Self::deserialize(Value::Object(known)).map_err(|e| BuildError { faults: vec![invalid(prefix, &e)] })
    }
}

/// Text as the value it means: the setting alone must read from it.
fn read(setting: &str, text: &str) -> Result<Value, serde_json::Error> {
    let number = || text.parse::<u64>().ok().map(Value::from).or_else(|| text.parse::<f64>().ok().map(Value::from));
    let value = number().filter(|number| !number.is_null()).unwrap_or_else(|| Value::from(text));
    let alone = Map::from_iter([(setting.to_owned(), value.clone())]);
    Settings::deserialize(Value::Object(alone)).map(|_| value)
}

fn invalid(variable: &str, why: &serde_json::Error) -> Fault {
    Fault::new(
        "setting-invalid",
        format!("{variable}: {why}"),
        "a setting that is not understood must not fall back to its default unseen",
        format!("{variable}=<a value as the text says>"),
    )
}

fn unknown(prefix: &str, variable: &str, name: &str) -> Fault {
    let lower = name.to_lowercase();
    let near = Settings::NAMES
        .iter()
        .map(|setting| (strsim::jaro_winkler(setting, &lower), setting))
        .filter(|(likeness, _)| *likeness >= NEAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, setting)| format!("{prefix}_{}", setting.to_uppercase()));
    // The value is not told: it may belong to something else, a secret for instance.
    Fault::new(
        "setting-unknown",
        match &near {
            Some(near) => format!("{variable} is no setting; the nearest is {near}"),
            None => format!("{variable} is no setting"),
        },
        "a misspelt name would leave its setting at the default unseen",
        match near {
            Some(near) => format!("{near}=.. or another prefix: Settings::from_env(\"MY_HAPAX\")"),
            None => "unset it, or take another prefix: Settings::from_env(\"MY_HAPAX\")".to_owned(),
        },
    )
}
