//! What ARCHITECTURE.md says is absent, looked for in the sources: an invariant that nobody checks is a wish.

use std::fs;
use std::path::{Path, PathBuf};

const ARCHITECTURE: &str = include_str!("../../ARCHITECTURE.md");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust file below, with its path from there, sorted.
fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|ending| ending == "rs") {
                let name = entry.strip_prefix(folder).expect("it is below").to_string_lossy().replace('\\', "/");
                found.push((name, fs::read_to_string(&entry).expect("it is read")));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "there are no sources in {}", folder.display());
    found
}

/// The lines that are code: no comments, and nothing behind the unit tests.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().map(str::trim_start);
    lines.take_while(|line| *line != "mod tests {").filter(|line| !line.starts_with("//"))
}

#[test]
fn only_consumer_and_service_know_the_runtime() {
    for (name, text) in sources(&root().join("core/src")) {
        let may = name == "lib.rs" || name == "service.rs" || name.starts_with("consumer");
        let knows = code(&text).find(|line| line.contains("crate::consumer"));
        assert!(may || knows.is_none(), "{name} imports the runtime: {knows:?}");
    }
}

/// The contracts are what adapters are written against; users' side and runtime stay out of them.
#[test]
fn the_contract_files_import_only_each_other() {
    const CONTRACT: [&str; 7] = ["broker", "cloudevents", "dead_letter", "error", "message", "publisher", "store"];
    let core = sources(&root().join("core/src"));
    for file in CONTRACT.iter().chain(&["record"]) {
        let (_, text) = core.iter().find(|(name, _)| *name == format!("{file}.rs")).expect("it is there");
        for line in code(text) {
            let Some((_, path)) = line.split_once("crate::") else { continue };
            let module = path.split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap_or_default();
            // `crate::Result` and the like are re-exports of these files.
            assert!(module.is_empty() || CONTRACT.contains(&module), "{file}.rs imports {module}: {line}");
        }
    }
}

#[test]
fn decisions_are_pure() {
    const PURE: [&str; 6] = [
        "record.rs",
        "retry.rs",
        "consumer/verdict.rs",
        "consumer/builder/plan.rs",
        "guarantee/windows.rs",
        "identity.rs",
    ];
    let core = sources(&root().join("core/src"));
    for file in PURE {
        let (_, text) = core.iter().find(|(name, _)| name == file).expect("it is there");
        let impure = code(text).find(|line| {
            ["async ", ".await", "tokio", "fastrand::", "SystemTime", "Instant"].iter().any(|word| line.contains(word))
        });
        assert_eq!(impure, None, "{file} is to decide without clock, chance and waiting");
    }
}

const ADAPTERS: [&str; 6] = ["kafka", "memory", "postgres", "rabbitmq", "redis", "sqlite"];

#[test]
fn adapters_know_neither_each_other_nor_the_runtime() {
    const RUNTIME: [&str; 5] = ["Consumer", "ConsumerBuilder", "Service", "Handler", "Route"];
    for adapter in ADAPTERS {
        let folder = root().join("adapters").join(adapter);
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).expect("a manifest");
        // Its tests may have what they like.
        let users = manifest.split("[dev-dependencies]").next().expect("a manifest begins");
        let other = users.lines().find(|line| line.starts_with("hapax-"));
        assert_eq!(other, None, "hapax-{adapter} depends on another package of this repository than hapax");
        for (name, text) in sources(&folder.join("src")) {
            for line in code(&text) {
                let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
                // What clients call so is theirs.
                const OF_CLIENTS: [(&str, &str); 3] =
                    [("kafka", "Consumer"), ("rabbitmq", "Consumer"), ("redis", "Route")];
                let of_client = |word: &str| OF_CLIENTS.contains(&(adapter, word));
                let found = words.find(|word| RUNTIME.contains(word) && !of_client(word));
                assert_eq!(found, None, "adapters/{adapter}/src/{name}: {line}");
            }
        }
    }
}

#[test]
fn nothing_is_unbounded() {
    let folders = ADAPTERS.map(|adapter| format!("adapters/{adapter}/src"));
    for folder in folders.into_iter().chain(["core/src".to_owned(), "tests/src".to_owned()]) {
        for (name, text) in sources(&root().join(&folder)) {
            let found = code(&text).find(|line| line.contains("unbounded_channel") || line.contains("::unbounded("));
            assert_eq!(found, None, "{folder}/{name} has a queue without a bound");
        }
    }
}

/// A map with holes leads nowhere.
#[test]
fn the_code_map_names_every_file_of_core_and_none_that_is_gone() {
    let map = ARCHITECTURE.split("```").find(|part| part.contains("pipeline.rs ")).expect("a code map");
    let named: Vec<&str> = map.split_whitespace().filter(|word| word.ends_with(".rs")).collect();
    for (name, _) in sources(&root().join("core/src")) {
        let file = name.rsplit('/').next().unwrap_or(&name);
        assert!(file == "tests.rs" || named.contains(&file), "core/src/{name} is not in ARCHITECTURE.md");
    }
    let core = sources(&root().join("core/src"));
    for file in named {
        assert!(core.iter().any(|(name, _)| name.ends_with(file)), "ARCHITECTURE.md names {file}, which is gone");
    }
}
