//! Who asks a container to end. Its keeper is told before, so that the end is known as one that was asked for. Whoever goes
//! away without it takes that back, also by being dropped in the middle of waiting: or a crash long after would pass for
//! what was once asked.

use super::{Guest, Running, Shared};
use karst_guest::{
    AskedBy, GuestWish,
    keeper::{Keeper, Requested, State},
};
use karst_model::{Error, ErrorKind, InstanceId, Result};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{runtime::Handle, task::JoinHandle, time::timeout};

/// How long an application's program may take to handle the signal that asks it to end.
const DEAF: Duration = Duration::from_secs(2);
/// How long the end of a guest that somebody asked, and did not wait for, is one that was asked for.
const COUNTS: Duration = Duration::from_secs(600);

/// Requests to a guest to shut down.
#[derive(Default)]
pub(super) struct Requests {
    /// How many wait for it.
    waiting: AtomicUsize,
    /// Held while the keeper is told, so that none tells it what another has just made untrue.
    telling: tokio::sync::Mutex<()>,
}

/// One that waits for the end.
pub(super) struct Asking {
    guest: Arc<Guest>,
    keeper: Keeper,
    waits: bool,
}

impl Shared {
    /// Tells the keeper that the guest is asked to shut down, as long as what comes back lives.
    ///
    /// # Errors
    /// Not found when it has ended.
    pub(super) async fn asks(&self, running: &Running) -> Result<Asking> {
        let guest = self.guest(running.record.instance);
        guest.requests.waiting.fetch_add(1, Ordering::SeqCst);
        // Before anything is told: who is dropped in the middle of that takes it back too.
        let asking = Asking { guest: guest.clone(), keeper: running.keeper.clone(), waits: true };
        let _telling = guest.requests.telling.lock().await;
        running.keeper.mark(Requested::Shutdown).await?;
        Ok(asking)
    }

    /// Asks it to shut down and waits for its end, for so long.
    ///
    /// # Errors
    /// Timeout when it runs on; not found when it has ended.
    pub(super) async fn stop_graceful(&self, running: &Running, time: Duration) -> Result<()> {
        let Some(init) = running.init() else {
            return Err(Error::unavailable("the guest is just starting; try again, or force it"));
        };
        let asking = self.asks(running).await?;
        if self.cgroups.is_frozen(&running.groups.limits) {
            self.cgroups.freeze(&running.groups.limits, false).await?;
        }
        let chosen = running.record.fixed.program.as_ref().and_then(|p| p.stop_signal);
        let chosen = running.record.application.then(|| chosen.unwrap_or(libc::SIGTERM));
        if let Some(signal) = chosen.filter(|s| !init.minds(*s)) {
            // The kernel keeps from the first process of a container what that does not handle: it cannot be asked to end.
            // A program that has only just started may still prepare for it.
            tokio::time::sleep(DEAF.min(time)).await;
            if !init.minds(signal) {
                asking.followed();
                init.signal(rustix::process::Signal::KILL);
                return running.keeper.wait_exit().await.map(drop);
            }
        }
        let asked = AtomicBool::new(false);
        let work = async {
            // An init that has not yet installed its handler ignores the signal for good.
            let signal = loop {
                match chosen.or_else(|| init.halt_signal()) {
                    Some(signal) => break signal,
                    None if init.lives() => tokio::time::sleep(Duration::from_millis(5)).await,
                    None => return running.keeper.wait_exit().await.map(drop),
                }
            };
            init.signal_number(signal)?;
            asked.store(true, Ordering::Relaxed);
            running.keeper.wait_exit().await.map(drop)
        };
        match timeout(time, work).await {
            Ok(Err(e)) if !e.is(ErrorKind::NotFound) => Err(e),
            // Also when it was gone before it could be asked.
            Ok(_) => {
                asking.followed();
                Ok(())
            }
            Err(_) => {
                asking.take_back().await;
                Err(Error::timeout(match asked.into_inner() {
                    true => format!(
                        "the guest did not shut down within {} s; force it, or look at its console",
                        time.as_secs()
                    ),
                    false => format!(
                        "the guest's init was not ready to be asked to shut down within {} s, or it is none; force it, or look at its console",
                        time.as_secs()
                    ),
                }))
            }
        }
    }

    /// What a container can be asked, and by whom.
    pub(super) async fn ask(&self, instance: InstanceId, wish: GuestWish, by: AskedBy) -> Result<()> {
        if wish == GuestWish::Reboot {
            return Err(Error::unsupported("a container is restarted; it does not boot anew by itself"));
        }
        if by == AskedBy::Agent {
            return Err(Error::unsupported("a container has no agent; its init is asked"));
        }
        self.ask_to_end(&self.running(instance).await?).await
    }

    /// Asks it to shut down, once, and waits for nothing. One that is frozen hears it when it goes on.
    ///
    /// # Errors
    /// Not found when it has ended, unavailable when its first process does not listen.
    async fn ask_to_end(&self, running: &Running) -> Result<()> {
        let Some(init) = running.init() else {
            return Err(Error::unavailable("the guest is just starting; try again, or force it"));
        };
        let chosen = running.record.fixed.program.as_ref().and_then(|p| p.stop_signal);
        let signal = match running.record.application {
            true => Some(chosen.unwrap_or(libc::SIGTERM)).filter(|s| init.minds(*s)),
            false => init.halt_signal(),
        };
        // What it does not handle the kernel would keep from it.
        let signal = signal.ok_or_else(|| {
            Error::unavailable(
                "the first process of the guest does not listen to requests to shut down (yet); try again, or force it",
            )
        })?;
        let guest = self.guest(running.record.instance);
        // Somebody waits already, and the keeper knows.
        if guest.requests.waiting.load(Ordering::SeqCst) > 0 {
            return init.signal_number(signal);
        }
        let asking = self.asks(running).await?;
        init.signal_number(signal)?;
        let keeper = running.keeper.clone();
        tokio::spawn(async move {
            match timeout(COUNTS, keeper.wait_exit()).await {
                Ok(_) => asking.followed(),
                Err(_) => asking.take_back().await,
            }
        });
        Ok(())
    }

    /// Tells the keeper that the guest is ended by force.
    ///
    /// # Errors
    /// Not found when it has ended.
    pub(super) async fn forces(&self, running: &Running) -> Result<()> {
        let guest = self.guest(running.record.instance);
        let _telling = guest.requests.telling.lock().await;
        running.keeper.mark(Requested::Force).await
    }
}

impl Asking {
    /// It has ended, or nothing keeps it from that any more.
    pub(super) fn followed(mut self) {
        self.waits = false;
        self.guest.requests.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// It did not follow, and nobody asks any more. Answers when the keeper knows.
    pub(super) async fn take_back(mut self) {
        if let Some(told) = self.withdraw() {
            // It says itself what went wrong.
            let _ = told.await;
        }
    }

    fn withdraw(&mut self) -> Option<JoinHandle<()>> {
        if !std::mem::take(&mut self.waits) {
            return None;
        }
        self.guest.requests.waiting.fetch_sub(1, Ordering::SeqCst);
        let runtime = Handle::try_current().ok()?;
        let (guest, keeper) = (self.guest.clone(), self.keeper.clone());
        Some(runtime.spawn(async move {
            let requests = &guest.requests;
            let _telling = requests.telling.lock().await;
            if requests.waiting.load(Ordering::SeqCst) > 0 {
                return;
            }
            // Nor of one that was ended by force since, or has ended: that stays what it was.
            let asked = |s: karst_guest::keeper::Status| {
                s.state == State::Running && s.requested == Requested::Shutdown
            };
            if keeper.status().await.is_ok_and(asked)
                && let Err(e) = keeper.mark(Requested::Nobody).await
            {
                tracing::debug!(error = %e, "a keeper goes on thinking that its guest is asked to end");
            }
        }))
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        drop(self.withdraw());
    }
}
