//! The helpers beside a running container: its proxies.

use super::{Running, Shared};
use crate::{config::Groups, proxies, record::Record};
use karst_guest::IdRange;
use karst_model::{Error, InstanceId, Result, spec::ProxySpec};
use std::{os::unix::fs::chown, path::Path, sync::Weak, time::Duration};

/// How often, and how many times, sockets in a guest that has begun a life are looked after.
const LOOK: Duration = Duration::from_millis(500);
const LOOKS: u32 = 120;

/// Files of a control group that its owner writes; on v1 there are no others of that kind.
const OWNED: [&str; 3] = ["", "cgroup.procs", "tasks"];

/// Gives the group in the hierarchy of disks' rates to the container's root, who makes groups for the containers within:
/// Docker starts none without.
pub(super) fn free_rates(mount: &Path, groups: &Groups, ids: IdRange) -> Result<()> {
    for file in OWNED {
        chown(mount.join(&groups.limits).join(file), Some(ids.base), Some(ids.base))?;
    }
    Ok(())
}

impl Shared {
    /// What a helper beside the container is made of.
    pub(super) fn place<'a>(
        &'a self,
        dir: &'a Path,
        record: &'a Record,
        groups: &'a Groups,
    ) -> proxies::Place<'a> {
        proxies::Place {
            state_dir: dir,
            daemon_id: &record.daemon_id,
            instance: record.instance,
            ids: record.ids,
            cgroups: &self.cgroups,
            group: &groups.keeper,
        }
    }

    /// Looks after sockets in a guest that begins a life: its init mounts file systems over places where they have been made
    /// before it got there, such as `/run`. They are made again then.
    pub(super) fn keep_sockets(weak: Weak<Self>, instance: InstanceId) {
        tokio::spawn(async move {
            for _ in 0..LOOKS {
                tokio::time::sleep(LOOK).await;
                let Some(shared) = weak.upgrade() else { return };
                let Ok(running) = shared.running(instance).await else { return };
                if !running.record.proxies.iter().any(proxies::listens_inside) {
                    return;
                }
                let Some(init) = running.init() else { continue };
                let hidden = |p: &ProxySpec| !proxies::is_there(&init, p);
                if !running.record.proxies.iter().any(hidden) {
                    continue;
                }
                let guest = shared.guest(instance);
                let _changing = guest.changing.lock().await;
                // As it is now.
                let Ok(running) = shared.running(instance).await else { return };
                for proxy in running.record.proxies.iter().filter(|p| hidden(p)) {
                    let again = async {
                        proxies::stop(&running.dir, None, proxy).await?;
                        shared.start_proxies(&running, std::slice::from_ref(proxy)).await
                    };
                    if let Err(e) = again.await {
                        tracing::debug!(%instance, proxy = proxy.name, error = %e, "a socket in a guest is not there yet");
                    }
                }
            }
        });
    }

    pub(super) async fn start_proxies(&self, running: &Running, wanted: &[ProxySpec]) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let init =
            running.init().ok_or_else(|| Error::unavailable("the guest is just starting; try again"))?;
        let place = self.place(&running.dir, &running.record, &running.groups);
        for proxy in wanted {
            proxies::start(&place, &init, proxy).await?;
        }
        Ok(())
    }

    /// Brings the proxies of a running guest to what is wanted; writes the record as it goes.
    pub(super) async fn update_proxies(
        &self,
        running: &Running,
        wanted: &[ProxySpec],
        record: &mut Record,
    ) -> Result<()> {
        let gone: Vec<_> = record.proxies.iter().filter(|p| !wanted.contains(p)).cloned().collect();
        for proxy in gone {
            proxies::stop(&running.dir, running.init().as_ref(), &proxy).await?;
            record.proxies.retain(|p| *p != proxy);
            record.write(&running.dir)?;
        }
        for proxy in wanted.iter().filter(|p| !record.proxies.contains(p)).cloned().collect::<Vec<_>>() {
            record.proxies.push(proxy.clone());
            record.write(&running.dir)?;
            if let Err(e) = self.start_proxies(running, std::slice::from_ref(&proxy)).await {
                proxies::stop(&running.dir, running.init().as_ref(), &proxy).await?;
                record.proxies.retain(|p| *p != proxy);
                record.write(&running.dir)?;
                return Err(e);
            }
        }
        // One that was killed comes back.
        self.start_proxies(running, wanted).await
    }
}
