//! A container is asked to shut down, in the way that its init takes for such a request.

use super::{Running, Shared};
use karst_model::{Error, ErrorKind, Result};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};
use tokio::time::timeout;

/// How long an application's program may take to handle the signal that asks it to end.
const DEAF: Duration = Duration::from_secs(2);

impl Shared {
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
}
