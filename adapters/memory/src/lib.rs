//! The in-memory broker and store of hapax: the executable reference.
