//! A Lua script as the server knows it: by the digest of its text, and by the text where the server forgot it.

use redis::Cmd;

/// A script of ours.
#[derive(Debug)]
pub(crate) struct Script {
    source: &'static str,
    digest: String,
}

impl Script {
    pub(crate) fn new(source: &'static str) -> Self {
        Self { source, digest: redis::Script::new(source).get_hash().to_owned() }
    }

    /// The call by digest, a few bytes; answered with NOSCRIPT after a restart, a failover or `SCRIPT FLUSH`.
    pub(crate) fn by_digest(&self, keys: &[impl AsRef<[u8]>], arguments: &[impl AsRef<[u8]>]) -> Cmd {
        call("EVALSHA", &self.digest, keys, arguments)
    }

    /// The call with the text, which the server keeps: works always, and needs no right to `SCRIPT LOAD`.
    pub(crate) fn by_text(&self, keys: &[impl AsRef<[u8]>], arguments: &[impl AsRef<[u8]>]) -> Cmd {
        call("EVAL", self.source, keys, arguments)
    }
}

fn call(verb: &str, script: &str, keys: &[impl AsRef<[u8]>], arguments: &[impl AsRef<[u8]>]) -> Cmd {
    let bytes: usize =
        keys.iter().map(|key| key.as_ref().len()).chain(arguments.iter().map(|text| text.as_ref().len())).sum();
    let mut command = Cmd::with_capacity(3 + keys.len() + arguments.len(), script.len() + 16 + bytes);
    command.arg(verb).arg(script).arg(keys.len());
    for part in keys.iter().map(AsRef::as_ref).chain(arguments.iter().map(AsRef::as_ref)) {
        command.arg(part);
    }
    command
}
