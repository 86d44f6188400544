//! NICs of a container over its life: its start, changes, reboots from inside, its end.

use super::Running;
use crate::{nics, record::Record};
use karst_guest::ResolvedGuest;
use karst_model::{Error, Result};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

/// Makes what `lxc-start` does not, in the network namespace that it has made.
pub(super) async fn plug(dir: &Path, record: &Record, namespace: OwnedFd) -> Result<()> {
    let (dir, nics) = (dir.to_owned(), record.nics.clone());
    blocking(move || {
        nics.iter().filter(|n| n.plugged).try_for_each(|nic| nics::plug(&dir, namespace.as_fd(), nic))
    })
    .await
}

/// After a reboot from inside.
pub(super) async fn again(running: &Running) -> Result<()> {
    let Some(init) = running.init() else { return Ok(()) };
    let (dir, nics, gone) = (running.dir.clone(), running.record.nics.clone(), running.record.gone.clone());
    blocking(move || {
        let namespace = karst_host::netns::namespace_of(init.pid)?;
        nics::again(&dir, namespace.as_fd(), &nics, &gone)
    })
    .await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::internal("work on a guest's network was broken off", e))?
}

/// As [`nics::clear`]; quick where a guest has none that need it.
pub(super) async fn clear(dir: &Path, record: &Record) -> Result<()> {
    if record.nics.iter().all(|n| !n.plugged) {
        return Ok(());
    }
    let (dir, nics) = (dir.to_owned(), record.nics.clone());
    blocking(move || nics::clear(&dir, &nics)).await
}

/// Brings the NICs of a running guest to what is wanted; writes the record as it goes.
pub(super) async fn update(running: &Running, guest: &ResolvedGuest, record: &mut Record) -> Result<()> {
    let pid = running.init().ok_or_else(|| Error::unavailable("the guest is just starting; try again"))?.pid;
    let (dir, wanted, mut kept) = (running.dir.clone(), guest.nics.clone(), record.clone());
    let updated = blocking(move || {
        let namespace = karst_host::netns::namespace_of(pid)?;
        let mut now = nics::Nics { nics: kept.nics.clone(), gone: kept.gone.clone() };
        let outcome = nics::update(&dir, namespace.as_fd(), &mut now, &wanted, &mut |now| {
            (kept.nics, kept.gone) = (now.nics.clone(), now.gone.clone());
            kept.write(&dir)
        });
        Ok((now, outcome))
    });
    let (now, outcome) = updated.await?;
    (record.nics, record.gone) = (now.nics, now.gone);
    outcome
}
