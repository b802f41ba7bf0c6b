//! Certificates for a server of a test's own, made by `openssl` in a folder that is removed at the end.
//!
//! Each in a file of its name, with a key beside it (PKCS 8): `ca.pem`, an authority; `localhost.pem` and `client.pem`, signed
//! by it for these names; `other.pem`, an authority that signed nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder of them.
#[derive(Debug)]
pub struct Certificates(PathBuf);

impl Certificates {
    /// Valid for two days.
    ///
    /// # Panics
    ///
    /// Where `openssl` is missing or refuses.
    pub fn new() -> Self {
        let name = format!("hapax-certificates-{}-{:x}", std::process::id(), fastrand::u64(..));
        let made = Self(std::env::temp_dir().join(name));
        std::fs::create_dir(&made.0).expect("a folder");
        for ca in ["ca", "other"] {
            made.openssl(&format!(
                "req -x509 {NEW_KEY} -days 2 -keyout {ca}.key -out {ca}.pem -subj /CN=hapax-tests-{ca}"
            ));
        }
        for name in ["localhost", "client"] {
            std::fs::write(made.path("extensions"), format!("subjectAltName=DNS:{name}\n")).expect("a file");
            made.openssl(&format!("req {NEW_KEY} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
            let sign = "x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions";
            made.openssl(&format!("{sign} -in {name}.csr -out {name}.pem"));
        }
        made
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Where a file is.
    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    /// What is in a file.
    ///
    /// # Panics
    ///
    /// Where there is none of this name.
    pub fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.path(file)).expect("a file that was made")
    }

    fn openssl(&self, words: &str) {
        let made = Command::new("openssl").args(words.split(' ')).current_dir(&self.0).output();
        let made = made.expect("openssl is installed");
        assert!(made.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&made.stderr));
    }
}

/// Signs and is made faster than RSA.
const NEW_KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

impl Default for Certificates {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _left = std::fs::remove_dir_all(&self.0);
    }
}
