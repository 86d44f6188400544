//! The power button of a machine, and how one boots anew by it: QEMU is told to halt where it would end (`set-action`), the
//! button is pressed, and a guest that has shut down is reset and goes on. It is the same QEMU, with all that is plugged, shown
//! and connected; what waits for the next start goes on waiting.
//!
//! That it is to boot anew is written down first, so that a host process that comes later finishes it. It is so for a time only: a
//! guest that did not heed the button, and is shut down from inside hours later, stays down.

use super::Owner;
use karst_model::Result;
use serde_json::json;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a guest may take from the button to its end.
pub(super) const WINDOW: Duration = Duration::from_secs(600);
/// How often, and after which pause, a machine that was reset is let go on: QEMU resets between two commands.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(100);

impl Owner {
    /// Presses the power button, once.
    pub(super) async fn press(&mut self, anew: bool) -> Result<()> {
        // One that ends when it boots anew ends when it shuts down, too; and whoever waits for an end is to see it.
        let ends = self.machine.record().hardware.as_ref().is_some_and(|h| h.ends_on_reboot);
        if anew && !ends && self.stopping.is_none() {
            self.write_anew(true)?;
            self.qmp("set-action", json!({"shutdown": "pause"})).await?;
            self.anew = Some(Instant::now() + WINDOW);
        } else {
            self.stays_down().await?;
        }
        self.qmp("system_powerdown", json!({})).await
    }

    /// Who shuts down stays down.
    pub(super) async fn stays_down(&mut self) -> Result<()> {
        if self.anew.is_some() || self.machine.record().anew {
            self.qmp("set-action", json!({"shutdown": "poweroff"})).await?;
            self.anew = None;
            self.write_anew(false)?;
        }
        Ok(())
    }

    /// The guest has shut down and QEMU stands still for that.
    pub(super) async fn has_shut_down(&mut self) {
        let instance = self.machine.record().instance;
        if self.anew.is_some() {
            match self.boots_anew().await {
                Ok(()) => return tracing::info!(%instance, "a guest that was asked to boots anew"),
                Err(e) => {
                    tracing::warn!(%instance, error = %e, context = e.context, "a guest that was to boot anew stays down");
                }
            }
        }
        // Its end tells the rest.
        if let Err(e) = self.qmp("quit", json!({})).await {
            tracing::debug!(%instance, error = %e, "QEMU does not end yet");
        }
    }

    async fn boots_anew(&mut self) -> Result<()> {
        self.qmp("system_reset", json!({})).await?;
        let mut tries = 1;
        while let Err(e) = self.qmp("cont", json!({})).await {
            if tries == TRIES {
                return Err(e);
            }
            tries += 1;
            sleep(PAUSE).await;
        }
        self.heard = None;
        // It boots already, whatever becomes of this: then it is tried again.
        if let Err(e) = self.stays_down().await {
            let instance = self.machine.record().instance;
            tracing::debug!(%instance, error = %e, "QEMU does not take it back yet that its guest was to boot anew");
            self.anew = Some(Instant::now() + PAUSE);
        }
        Ok(())
    }

    fn write_anew(&self, anew: bool) -> Result<()> {
        let mut record = self.machine.record();
        record.anew = anew;
        record.write(&self.machine.dir)
    }
}
