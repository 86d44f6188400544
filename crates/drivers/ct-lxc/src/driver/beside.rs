//! The helpers beside a running container: its proxies.

use super::{Guest, Running, Shared, lock};
use crate::{config::Groups, proxies, record::Record};
use karst_guest::IdRange;
use karst_model::{Error, InstanceId, Result, spec::ProxySpec};
use std::{os::unix::fs::chown, path::Path, sync::Arc, time::Duration};

/// How often sockets in a guest are looked after: in its first minute, when its init mounts file systems, and later.
const LOOK: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// How many looks are such first ones.
const FIRST: u32 = 120;
/// How often a socket cannot be made until that is a warning.
const TRIES: u32 = 20;

/// How sockets in a guest have been looked after.
#[derive(Debug, Default)]
struct Looks {
    /// The guest's init.
    life: u32,
    /// In this life.
    count: u32,
    /// In a row, that left one without its place.
    failures: u32,
}

impl Looks {
    fn wait(&self) -> Duration {
        let soon = self.count < FIRST || (1..TRIES).contains(&self.failures);
        if soon { LOOK.0 } else { LOOK.1 }
    }

    fn of(&mut self, life: u32) {
        if self.life != life {
            *self = Self { life, ..Self::default() };
        }
        self.count = self.count.saturating_add(1);
    }

    fn fine(&mut self) {
        self.failures = 0;
    }

    /// Answers whether it has failed for long.
    fn failed(&mut self) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.failures >= TRIES
    }
}

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
            users: record.inside(),
            cgroups: &self.cgroups,
            group: &groups.keeper,
        }
    }

    /// Looks after the sockets in a guest at which its proxies listen, as long as there are any: something inside may mount a
    /// file system over their places, as its init does over `/run`, or take them away. They are made again; what cannot be
    /// made for a while is a warning of the host until it can.
    pub(super) fn keep_sockets(self: &Arc<Self>, instance: InstanceId) {
        let guest = self.guest(instance);
        if std::mem::replace(&mut *lock(&guest.keeping), true) {
            return;
        }
        let weak = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut looks = Looks::default();
            loop {
                tokio::time::sleep(looks.wait()).await;
                let Some(shared) = weak.upgrade() else { return };
                if !shared.look(instance, &guest, &mut looks).await {
                    return;
                }
            }
        });
    }

    /// Answers whether there is anything left to be looked after.
    async fn look(&self, instance: InstanceId, guest: &Guest, looks: &mut Looks) -> bool {
        let listens = |running: &Running| running.record.proxies.iter().any(proxies::listens_inside);
        let (init, hidden) = match self.running(instance).await {
            Ok(running) if listens(&running) => {
                let Some(init) = running.init() else { return true };
                let hidden = running.record.proxies.iter().any(|p| !proxies::is_there(&init, p));
                (init.pid, hidden)
            }
            _ => {
                // Who starts it, or gives it a proxy, holds this and calls again afterwards.
                let _changing = guest.changing.lock().await;
                let more = self.running(instance).await.is_ok_and(|r| listens(&r));
                if !more {
                    *lock(&guest.keeping) = false;
                    lock(&self.hidden).retain(|(id, _), _| *id != instance);
                }
                return more;
            }
        };
        looks.of(init);
        if !hidden {
            looks.fine();
            self.found(instance, |_| true);
            return true;
        }
        let _changing = guest.changing.lock().await;
        // As it is now.
        let Ok(running) = self.running(instance).await else { return true };
        let Some(init) = running.init() else { return true };
        self.found(instance, |name| !running.record.proxies.iter().any(|p| p.name == name));
        let mut failed = None;
        for proxy in running.record.proxies.iter().filter(|p| !proxies::is_there(&init, p)) {
            let again = async {
                proxies::stop(&running.dir, None, proxy).await?;
                self.start_proxies(&running, std::slice::from_ref(proxy)).await
            };
            match again.await {
                Ok(()) => self.found(instance, |name| name == proxy.name),
                Err(e) => failed = Some((proxy.name.clone(), e)),
            }
        }
        match failed {
            None => looks.fine(),
            Some((name, e)) if looks.failed() => {
                let text = format!(
                    "proxy {name:?} of instance {instance} has no socket in the guest: {}",
                    e.message
                );
                let known = lock(&self.hidden).insert((instance, name.clone()), text);
                if known.is_none() {
                    tracing::warn!(%instance, proxy = name, error = %e, "a socket in a guest cannot be made; it is tried again");
                }
            }
            Some((name, e)) => {
                tracing::debug!(%instance, proxy = name, error = %e, "a socket in a guest is not there yet")
            }
        }
        true
    }

    /// These proxies have their sockets, or are no more.
    fn found(&self, instance: InstanceId, which: impl Fn(&str) -> bool) {
        lock(&self.hidden).retain(|(id, name), _| {
            let gone = *id == instance && which(name);
            if gone {
                tracing::info!(%instance, proxy = name.as_str(), "the socket in a guest is there again");
            }
            !gone
        });
    }

    /// What is wrong beside guests, in words, with their ids.
    pub(super) fn hidden_sockets(&self) -> Vec<String> {
        lock(&self.hidden).values().cloned().collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_often_at_first_and_after_a_failure() {
        let mut looks = Looks::default();
        for _ in 0..FIRST {
            assert_eq!(looks.wait(), LOOK.0);
            looks.of(7);
        }
        assert_eq!(looks.wait(), LOOK.1);
        assert!((1..TRIES).all(|_| !looks.failed()));
        assert_eq!(looks.wait(), LOOK.0);
        assert!(looks.failed());
        assert_eq!(looks.wait(), LOOK.1, "then it is no longer in a hurry");
        looks.fine();
        assert!(!looks.failed());
        looks.of(8);
        assert_eq!((looks.wait(), looks.failures), (LOOK.0, 0), "another life");
    }
}
