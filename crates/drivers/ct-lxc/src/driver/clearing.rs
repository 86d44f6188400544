//! The end of a container by force, and what is removed after any end: control groups, interfaces, proxies.

use super::{FORCE, Running, Shared};
use crate::{config::Groups, ending::Held, guest_api, proxies, record::Record};
use karst_guest::keeper;
use karst_host::{Program, link, run};
use karst_model::{Error, ErrorKind, InstanceId, Result};
use rustix::process::Signal;
use std::path::Path;
use tokio::time::timeout;

/// It ended by itself meanwhile.
fn gone_is_fine(e: Error) -> Result<()> {
    if e.is(ErrorKind::NotFound) { Ok(()) } else { Err(e) }
}

impl Shared {
    /// Removes what a dead guest may have left outside its directory. The caller holds `changing` and knows that no keeper
    /// lives.
    pub(super) async fn clear(
        &self,
        dir: &Path,
        groups: &Groups,
        interfaces: impl Iterator<Item = &str>,
    ) -> Result<()> {
        self.clear_guest(dir, groups, interfaces).await?;
        self.cgroups.remove(&groups.keeper).await
    }

    /// As [`Self::clear`], without the group of a keeper that may still be on its way out.
    pub(super) async fn clear_guest(
        &self,
        dir: &Path,
        groups: &Groups,
        interfaces: impl Iterator<Item = &str>,
    ) -> Result<()> {
        proxies::stop_all(dir).await?;
        guest_api::stop(dir).await?;
        for group in [&groups.limits, &groups.monitor] {
            if self.cgroups.exists(group) {
                // Nobody, normally; after a keeper was killed, what did not die with it.
                self.cgroups.kill(group).await?;
                self.cgroups.remove(group).await?;
            }
        }
        for name in interfaces {
            if Path::new("/sys/class/net").join(name).exists() {
                // It may go by itself at this moment, with its namespace.
                let out = run(Program::Ip).args(["link", "delete", "dev", name]).output().await?;
                if out.code != 0 && Path::new("/sys/class/net").join(name).exists() {
                    return Err(Error::internal(
                        "a network interface of the guest could not be removed",
                        String::from_utf8_lossy(&out.stderr),
                    ));
                }
            }
        }
        Ok(())
    }

    /// As [`Self::clear`], of what a record tells.
    pub(super) async fn clear_record(&self, record: &Record) -> Result<()> {
        let groups = Groups::of(&record.daemon_id, record.instance);
        let dir = self.dir(record.instance);
        self.clear(&dir, &groups, record.nics.iter().map(|n| n.host_interface.as_str())).await?;
        super::network::clear(&dir, record).await
    }

    /// Removes the group of a keeper once that has gone, which syncs its last words after it told them: nobody waits for
    /// that. Whoever starts or destroys the guest does it first if it is not done by then.
    pub(super) fn clear_keeper(&self, instance: InstanceId, groups: &Groups) {
        let (cgroups, dir, group) = (self.cgroups.clone(), self.dir(instance), groups.keeper.clone());
        let guest = self.guest(instance);
        tokio::spawn(async move {
            let gone = keeper::wait_gone(&dir).await;
            // The next keeper's is made under the same name: not while that happens, and not when it lives.
            let _changing = guest.changing.lock().await;
            if gone.is_ok()
                && !keeper::is_alive(&dir)
                && let Err(e) = cgroups.remove(&group).await
            {
                tracing::debug!(group, error = %e, "a keeper's control group is left for the next start");
            }
        });
    }

    /// Ends a container whose keeper does not answer: by the keeper's own end, which the guest follows.
    pub(super) async fn stop_silent(&self, running: &Running) -> Result<()> {
        tracing::warn!(instance = %running.record.instance, "ending a guest with its keeper, which does not answer");
        keeper::end_keeper(&running.dir)?;
        self.silence.forget(running.record.instance);
        keeper::wait_gone(&running.dir).await
    }

    /// Ends a container at once.
    pub(super) async fn stop_force(&self, running: &Running) -> Result<()> {
        self.forces(running).await?;
        let mut unlinked = None;
        // Closed at the end of this function, in the background.
        let mut _held = Held::default();
        match running.init() {
            Some(init) => {
                // The interfaces go while it dies: the kernel takes tens of milliseconds for each, which `lxc-start` would
                // add to the end. Whatever is left of them is removed afterwards, and an error is told then.
                let links: Vec<_> = running.record.nics.iter().map(|n| n.host_interface.clone()).collect();
                unlinked = Some(tokio::task::spawn_blocking(move || {
                    links.iter().for_each(|name| drop(link::delete(name)));
                }));
                let (cgroups, group) = (self.cgroups.clone(), running.groups.limits.clone());
                let held = move || Held::take(&cgroups.processes(&group));
                _held = tokio::task::spawn_blocking(held).await.unwrap_or_default();
                init.signal(Signal::KILL);
                // All that `lxc-start` would do at the end is done by `clear` too. Its children become the keeper's, which
                // ends when the last of them has.
                running.keeper.kill().await.or_else(gone_is_fine)?;
                if let Some((file, value)) = self.cgroups.freezer(&running.groups.limits, false)
                    && self.cgroups.is_frozen(&running.groups.limits)
                {
                    // On v1 the frozen do not die; thawed they die before they run.
                    self.cgroups.thaw_now(&file, value)?;
                }
            }
            None => running.keeper.kill().await.or_else(gone_is_fine)?,
        }
        let ended = match timeout(FORCE, running.keeper.wait_exit()).await {
            Ok(r) => r.map(drop),
            Err(_) => {
                running.keeper.kill().await?;
                timeout(FORCE, running.keeper.wait_exit())
                    .await
                    .map_err(|_| Error::timeout("the guest's processes do not end"))?
                    .map(drop)
            }
        };
        if let Some(unlinked) = unlinked {
            // Before the answer: the next start makes interfaces of the same names.
            let _ = unlinked.await;
        }
        ended
    }
}
