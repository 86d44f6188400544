//! Renaming snapshots, and when they go.

use super::{Found, Origin, Row2, check_note};
use crate::{Engine, context::Context, saga::runner};
use jiff::Timestamp;
use karst_model::{Error, Name, Result};

/// What a user may set of a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdateSnapshot {
    /// When it goes; `None` is never.
    pub expires_at: Option<Timestamp>,
    /// User's text; volumes only. `None` leaves it.
    pub description: Option<String>,
    /// User's text of a snapshot of an instance. `None` leaves it.
    pub note: Option<String>,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

impl Engine {
    /// Renames a snapshot. One of the schedule is its user's own from then on (`snapshots.keep`).
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, busy), forbidden.
    pub async fn snapshot_rename(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
        new: &str,
    ) -> Result<()> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        let new = Name::parse("name", new)?;
        let mut told = None;
        inner
            .transact(|records, tx| {
                let found = origin.find(records, project.id)?;
                let row = found.demand(records, name)?;
                if name == &*new {
                    return Ok(());
                }
                if found.demand(records, &new).is_ok() {
                    return Err(Error::conflict(format!(
                        "{} has a snapshot {:?} already",
                        found.words(),
                        &*new
                    ))
                    .at("name"));
                }
                runner::demand_unlocked(records, &[found.lock()])?;
                tx.expect_unlocked(&found.lock());
                row.taken().release_name(tx);
                match &row {
                    Row2::Instance(s) => {
                        let mut snapshot = s.value.clone();
                        snapshot.name = new.clone();
                        snapshot.scheduled = false;
                        snapshot.spec_version += 1;
                        tx.replace(s, &snapshot);
                        tx.take_name("snapshots", &s.instance.to_string(), &new, &s.id.to_string());
                    }
                    Row2::Volume(s) => {
                        let mut snapshot = s.value.clone();
                        snapshot.name = new.clone();
                        snapshot.scheduled = false;
                        snapshot.spec_version += 1;
                        tx.replace(s, &snapshot);
                        tx.take_name("volume_snapshots", &s.volume.to_string(), &new, &s.id.to_string());
                    }
                }
                let action = match &found {
                    Found::Instance(_) => "instance-snapshot-renamed",
                    Found::Volume(_) => "storage-volume-snapshot-renamed",
                };
                told = Some((action, found.path(records, &new)));
                Ok(())
            })
            .await?;
        if let Some((action, path)) = told {
            inner.announce(context, Some(project.id), action, path);
        }
        Ok(())
    }

    /// Says when a snapshot goes, and what its user says of it. One of the schedule that gets another end is its user's own
    /// from then on (`snapshots.keep`).
    ///
    /// # Errors
    /// Invalid (a time that is over, a text that is too long), not found, precondition failed, forbidden.
    pub async fn snapshot_update(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
        update: UpdateSnapshot,
    ) -> Result<()> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        let now = inner.env.now();
        check_note(update.note.as_deref().unwrap_or_default())?;
        let mut told = None;
        inner
            .transact(|records, tx| {
                let found = origin.find(records, project.id)?;
                let row = found.demand(records, name)?;
                if update.if_version.is_some_and(|v| v != row.spec_version()) {
                    return Err(Error::precondition_failed(format!(
                        "snapshot {name:?} has changed since it was read; read it again"
                    )));
                }
                if update.expires_at.is_some_and(|t| t <= now) && update.expires_at != row.expires_at() {
                    return Err(Error::invalid("expires_at", "the time at which it goes is over already"));
                }
                // Whoever says when it goes says that it does not go before by its number.
                let own = update.expires_at != row.expires_at();
                let action = match &row {
                    Row2::Instance(s) => {
                        let mut snapshot = s.value.clone();
                        snapshot.expires_at = update.expires_at;
                        snapshot.scheduled &= !own;
                        if let Some(text) = &update.note {
                            snapshot.note.clone_from(text);
                        }
                        snapshot.spec_version += 1;
                        tx.replace(s, &snapshot);
                        "instance-snapshot-updated"
                    }
                    Row2::Volume(s) => {
                        let mut snapshot = s.value.clone();
                        snapshot.expires_at = update.expires_at;
                        snapshot.scheduled &= !own;
                        if let Some(text) = &update.description {
                            snapshot.description.clone_from(text);
                        }
                        snapshot.spec_version += 1;
                        tx.replace(s, &snapshot);
                        "storage-volume-snapshot-updated"
                    }
                };
                told = Some((action, found.path(records, name)));
                Ok(())
            })
            .await?;
        if let Some((action, path)) = told {
            inner.announce(context, Some(project.id), action, path);
        }
        Ok(())
    }
}
