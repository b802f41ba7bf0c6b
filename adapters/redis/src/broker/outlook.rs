//! What is asked of a group from outside its consuming: before it starts, and before it ends.

use hapax::{Error, ErrorKind, Result};
use redis::{Cmd, Value};

use super::places::sources;
use super::{RedisBroker, entry, groups};
use crate::connect::Link;

impl RedisBroker {
    /// Creates the streams and groups that are missing, from the first entry on; with
    /// [`Topology::Check`](super::Topology::Check) looks whether they are there. Several may do so at once.
    pub async fn declare(&self) -> Result<()> {
        groups::prepare(&self.asking(), &self.settings).await
    }

    /// How many messages of this group come again: those that wait for the time of their retry, and those that a member
    /// holds, or held when it died.
    pub async fn waiting_for_retry(&self) -> Result<u64> {
        let link = self.asking();
        let mut waiting = 0;
        for place in &self.settings.places {
            let mut due = Cmd::new();
            due.arg("ZCARD").arg(&*place.due);
            waiting += counted(&link.query("count", &due).await?)?;
        }
        for source in sources(&self.settings.places) {
            let mut pending = Cmd::new();
            pending.arg("XPENDING").arg(&*source.key).arg(&*self.settings.group);
            let summary = match link.query("count", &pending).await {
                // Nobody consumed yet, so nobody holds anything.
                Err(error) if super::consuming::is_no_group(&error) => continue,
                summary => entry::items(summary?),
            };
            waiting += counted(summary.first().unwrap_or(&Value::Int(0)))?;
        }
        Ok(waiting)
    }

    /// The link of what runs, or one of its own.
    fn asking(&self) -> Link {
        self.consuming().map_or_else(|| self.settings.server.link(), |consuming| consuming.link.clone())
    }
}

fn counted(reply: &Value) -> Result<u64> {
    let count = entry::number(reply).and_then(|count| u64::try_from(count).ok());
    count.ok_or_else(|| Error::new(ErrorKind::Incompatible, "count").because("the answer is no number"))
}
