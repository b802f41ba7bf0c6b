//! Certificates, and the one thing the client leaves to its user: a cryptographic provider.

use std::fmt;

/// What was set beside the URL. Never shown.
#[derive(Clone, Default)]
pub(super) struct Certificates {
    pub(super) root: Option<Vec<u8>>,
    pub(super) client: Option<(Vec<u8>, Vec<u8>)>,
}

impl Certificates {
    #[cfg(feature = "tls")]
    pub(super) fn for_client(&self) -> redis::TlsCertificates {
        redis::TlsCertificates {
            client_tls: self.client.as_ref().map(|(client_cert, client_key)| redis::ClientTlsConfig {
                client_cert: client_cert.clone(),
                client_key: client_key.clone(),
            }),
            root_cert: self.root.clone(),
        }
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates")
            .field("root", &self.root.is_some())
            .field("client", &self.client.is_some())
            .finish()
    }
}

/// rustls takes the process' provider. Where the user installed one it stays; otherwise it is ring.
#[cfg(feature = "tls")]
pub(super) fn install_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Fails only where another thread was faster, and then there is one.
        let _there_is_one = rustls::crypto::ring::default_provider().install_default().is_err();
    }
}
