//! Containers that run are watched: through reboots from inside, and to their end, after which what they leave is cleared up.

use super::{Guest, Shared, lock, network};
use crate::{config::Groups, guest_api, proxies, record::Record};
use karst_guest::{
    Observed,
    keeper::{self, Keeper},
};
use karst_model::{InstanceId, Result};
use std::{
    sync::{Arc, Weak},
    time::Duration,
};

impl Shared {
    /// Waits for a guest's end in the background, clears up after it and tells.
    pub(super) fn watch(self: &Arc<Self>, instance: InstanceId, keeper: Keeper, keeper_pid: u32) {
        let guest = self.guest(instance);
        {
            let mut watched = lock(&guest.watched);
            if *watched == Some(keeper_pid) {
                return;
            }
            *watched = Some(keeper_pid);
        }
        let weak = Arc::downgrade(self);
        tokio::spawn(async move {
            let end = tokio::select! {
                end = Shared::end_of(&weak, instance, &keeper) => end,
                () = Shared::follow(&weak, instance, &guest) => return,
            };
            let Some(shared) = weak.upgrade() else {
                return;
            };
            if let Err(e) = &end {
                tracing::warn!(%instance, error = %e, context = e.context.as_deref(), "watching a guest failed");
            }
            lock(&guest.watched).take_if(|w| *w == keeper_pid);
            if matches!(end, Ok(keeper::End::KeeperLost(_))) {
                // A process that dies closes what it has open one after the other; its lock may come after its socket.
                let _ = keeper::wait_gone(&shared.dir(instance)).await; // one that does not go is looked at below
            }
            let observed = shared.after_end(instance, &guest).await;
            shared.balancer.wake();
            match observed {
                Ok(observed) => shared.tell(observed),
                Err(e) => {
                    tracing::warn!(%instance, error = %e, context = e.context.as_deref(), "clearing up after a guest")
                }
            }
        });
    }

    pub(super) async fn after_end(&self, instance: InstanceId, guest: &Guest) -> Result<Observed> {
        let _changing = guest.changing.lock().await;
        // It holds the network namespace.
        *lock(&guest.sampled) = None;
        *lock(&guest.root) = None;
        let dir = self.dir(instance);
        if !keeper::is_alive(&dir)
            && let Some(record) = Record::read(&dir)?
        {
            let groups = Groups::of(&record.daemon_id, instance);
            let interfaces = record.nics.iter().map(|n| n.host_interface.as_str());
            self.clear_guest(&dir, &groups, interfaces).await?;
            network::clear(&dir, &record).await?;
            self.clear_keeper(instance, &groups);
        }
        self.observe(instance).await
    }

    /// Follows a guest through its lives: after a reboot from inside it has another network, and control groups in which
    /// what was permitted live is not. Never answers.
    async fn follow(weak: &Weak<Self>, instance: InstanceId, guest: &Guest) {
        let mut last = None;
        loop {
            let init = match weak.upgrade() {
                Some(shared) => shared.running(instance).await.ok().and_then(|r| r.init()),
                None => return std::future::pending().await,
            };
            let Some(init) = init else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            if last.is_some_and(|pid| pid != init.pid)
                && let Some(shared) = weak.upgrade()
                && let Err(e) = shared.after_reboot(instance, guest).await
            {
                tracing::warn!(%instance, error = %e, context = e.context.as_deref(), "after a reboot from inside");
            }
            if last != Some(init.pid)
                && let Some(shared) = weak.upgrade()
            {
                shared.keep_sockets(instance);
            }
            last = Some(init.pid);
            // SAFETY: it owns the only descriptor of this number and drops it together with the registration.
            let pidfd = unsafe {
                tokio::io::unix::AsyncFd::register_with_interest(init.pidfd, tokio::io::Interest::READABLE)
            };
            match pidfd {
                Ok(pidfd) => drop(pidfd.readable().await),
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    }

    async fn after_reboot(&self, instance: InstanceId, guest: &Guest) -> Result<()> {
        let _changing = guest.changing.lock().await;
        let running = self.running(instance).await?;
        guest_api::forget_state(&running.dir)?;
        for node in running.record.disks.iter().filter_map(|d| d.node.as_ref()) {
            running.permit_device(&node.rule(), true).await?;
        }
        network::again(&running).await?;
        if !running.record.proxies.is_empty() {
            proxies::stop_all(&running.dir).await?;
            self.start_proxies(&running, &running.record.proxies).await?;
        }
        Ok(())
    }
}
