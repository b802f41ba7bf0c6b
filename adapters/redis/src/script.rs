//! A Lua script as the server knows it: by the digest of its text, and by the text where the server forgot it.

use redis::{Arg, Cmd};

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

    /// The beginning of a call by digest, a few bytes; answered with NOSCRIPT after a restart, a failover or `SCRIPT FLUSH`.
    /// Its keys and then its arguments, which take so many bytes, are added by the caller.
    pub(crate) fn begin(&self, keys: usize, arguments: usize, bytes: usize) -> Cmd {
        let mut command = Cmd::with_capacity(3 + keys + arguments, self.digest.len() + 16 + bytes);
        command.arg("EVALSHA").arg(&self.digest).arg(keys);
        command
    }

    /// The call by digest.
    pub(crate) fn by_digest(&self, keys: &[impl AsRef<[u8]>], arguments: &[impl AsRef<[u8]>]) -> Cmd {
        let parts = || keys.iter().map(AsRef::as_ref).chain(arguments.iter().map(AsRef::as_ref));
        let bytes = parts().map(<[u8]>::len).sum();
        let mut command = self.begin(keys.len(), arguments.len(), bytes);
        for part in parts() {
            command.arg(part);
        }
        command
    }

    /// A call by digest as one with the text, which the server keeps: works always, and needs no right to `SCRIPT LOAD`.
    pub(crate) fn by_text(&self, by_digest: &Cmd) -> Cmd {
        let mut command = Cmd::new();
        command.arg("EVAL").arg(self.source);
        for part in by_digest.args_iter().skip(2) {
            if let Arg::Simple(part) = part {
                command.arg(part);
            }
        }
        command
    }
}
