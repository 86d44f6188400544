//! Guests that crashed start again (`boot.autorestart`), each time a little later; one that then runs for a while begins
//! afresh. A start that fails is tried again for an hour, later each time, and is a warning from the second time on. What an
//! administrator stopped, what shut itself down and what a restart of the host ended are no crashes.

use crate::{Engine, EngineInner, compute::power::PowerRequest, context::Context, operations::LiveOperation};
use karst_env::EnvExt;
use karst_model::{
    Error, InstanceId,
    instance::{DesiredPower, ExitReason, Generation, Lifecycle, PowerAction},
    keys,
    operation::OperationState,
};
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

/// Before the first new start.
const FIRST: Duration = Duration::from_secs(1);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(300);
/// A guest that ran so long has recovered.
const RECOVERED: Duration = Duration::from_secs(600);
/// How often it is looked even when nothing was announced.
const SWEEP: Duration = Duration::from_secs(30);
/// How often while starts are under way.
const LOOK: Duration = Duration::from_secs(5);

/// How long one that does not start is tried again.
const GIVE_UP: Duration = Duration::from_secs(3600);

/// How a guest crashed so far. Kept in memory: a new daemon begins afresh.
#[derive(Default)]
struct Crashes {
    /// The start that crashed last.
    generation: Generation,
    /// Crashes in a row, this one included, and starts that failed after it.
    count: u32,
    /// When it is started.
    due: Duration,
    /// The start that is under way.
    operation: Option<LiveOperation>,
    /// It crashed and has not been started since.
    owed: bool,
    /// When a start failed first since the crash.
    failed_since: Option<Duration>,
    /// Why it ended, in words.
    why: String,
}

/// The wait before the start that follows the `count`th crash in a row.
fn wait(count: u32) -> Duration {
    FIRST.saturating_mul(1 << count.saturating_sub(1).min(16)).min(LONGEST)
}

/// Runs as long as the engine.
pub(crate) async fn follow(weak: Weak<EngineInner>) {
    let mut crashes: HashMap<InstanceId, Crashes> = HashMap::new();
    let Some(mut changes) = weak.upgrade().map(|i| i.inventory.changes()) else { return };
    loop {
        let Some(inner) = weak.upgrade() else { return };
        let next = round(&inner, &mut crashes).await;
        let env = inner.env.clone();
        drop(inner);
        // Changes come in bursts, and nothing here is in a hurry.
        env.sleep(Duration::from_millis(200)).await;
        if let Ok(Err(_)) = env.timeout(next.min(SWEEP), changes.changed()).await {
            return;
        }
    }
}

impl Crashes {
    /// Its guest has crashed in the start of this generation.
    fn crashed(&mut self, generation: Generation, why: &str, now: Duration) {
        self.generation = generation;
        why.clone_into(&mut self.why);
        // The end of a start that failed: it is counted as that.
        if std::mem::replace(&mut self.owed, true) {
            return;
        }
        let calm = now.saturating_sub(self.due) >= RECOVERED;
        self.count = if calm { 1 } else { self.count + 1 };
        self.due = now + wait(self.count);
        self.failed_since = None;
    }

    /// A start failed. Is it tried again, later than before? The second time people are told.
    fn failed(&mut self, now: Duration) -> (bool, bool) {
        let again = self.failed_since.is_some();
        let since = *self.failed_since.get_or_insert(now);
        self.count += 1;
        self.due = now + wait(self.count);
        self.owed = self.due.saturating_sub(since) <= GIVE_UP;
        (self.owed, again || !self.owed)
    }
}

/// Notes that a start failed, and says so.
fn failed(inner: &EngineInner, id: InstanceId, crashes: &mut Crashes, error: &Error) {
    let (again, told) = crashes.failed(inner.env.monotonic());
    let (wait, why) = (wait(crashes.count), &crashes.why);
    if again {
        tracing::warn!(instance = %id, %error, ?wait, "does not start again after a crash; trying again");
    } else {
        tracing::warn!(instance = %id, %error, "does not start again after a crash");
    }
    if told {
        let how = if again { "it is tried again" } else { "it is not tried again; start it" };
        let text = format!("crashed ({why}) and does not start again: {}; {how}", error.message);
        inner.unstarted.lock().unwrap_or_else(|e| e.into_inner()).insert(id, text);
    }
}

/// What became of the starts under way.
fn note_ends(inner: &EngineInner, crashes: &mut HashMap<InstanceId, Crashes>) {
    for (id, known) in crashes.iter_mut() {
        let Some(operation) = known.operation.as_ref().map(LiveOperation::snapshot) else { continue };
        if !operation.state.is_final() {
            continue;
        }
        known.operation = None;
        if operation.state == OperationState::Success {
            (known.owed, known.failed_since) = (false, None);
            continue;
        }
        let nothing = || Error::internal("the start ended without a word", operation.id);
        let error = operation.error.clone().unwrap_or_else(nothing);
        failed(inner, *id, known, &error);
    }
}

/// Starts what is due; answers when to look again.
async fn round(inner: &Arc<EngineInner>, crashes: &mut HashMap<InstanceId, Crashes>) -> Duration {
    note_ends(inner, crashes);
    let now = inner.env.monotonic();
    let mut due = vec![];
    let mut next = SWEEP;
    {
        let records = inner.inventory.read();
        crashes.retain(|id, _| records.instances.contains_key(id));
        for instance in records.instances.values() {
            let Some(runtime) = records.runtimes.get(&instance.id) else { continue };
            if !runtime.state.is_down() {
                // Somebody else has started it.
                if let Some(known) = crashes.get_mut(&instance.id)
                    && known.operation.is_none()
                    && known.generation < runtime.generation
                {
                    (known.owed, known.failed_since) = (false, None);
                }
                continue;
            }
            let crash = match &runtime.exit {
                Some(ExitReason::Crashed { detail }) if detail != crate::reconcile::HOST_RESTARTED => {
                    Some(detail)
                }
                _ => None,
            };
            let known = crashes.get(&instance.id);
            // A start that failed and was undone by force is no word of anybody's: the crash before it is still owed a start.
            let undone = matches!(runtime.exit, None | Some(ExitReason::Forced))
                && known.is_some_and(|k| k.owed && k.generation < runtime.generation);
            let wanted = (crash.is_some() || undone)
                // A start that failed since does not make up for the crash.
                && runtime.generation <= instance.generation
                && instance.power == DesiredPower::Running
                && instance.lifecycle == Lifecycle::Ready
                && !instance.ephemeral
                && records.lock(&crate::compute::lock(instance.id)).is_none();
            if !wanted || keys::optional_flag(&records.expanded(instance).0, "boot.autorestart") != Some(true)
            {
                continue;
            }
            let known =
                crashes.entry(instance.id).or_insert_with(|| Crashes { due: now, ..Crashes::default() });
            if let Some(why) = crash
                && known.generation != runtime.generation
            {
                known.crashed(runtime.generation, why, now);
            }
            if !known.owed || known.operation.is_some() {
                continue;
            }
            if known.due <= now {
                let project = records.projects.get(&instance.project).map(|p| p.name.to_string());
                due.extend(project.map(|p| (p, instance.name.to_string(), instance.id)));
            } else {
                next = next.min(known.due - now);
            }
        }
    }
    let engine = Engine { inner: inner.clone() };
    for (project, name, id) in due {
        let request =
            PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful: true };
        let begun = engine.instance_power(&Context::system(), &project, &name, request).await;
        let Some(known) = crashes.get_mut(&id) else { continue };
        match begun {
            Ok(operation) => {
                tracing::info!(instance = %name, "starts again after a crash");
                known.operation = Some(operation);
            }
            Err(e) => {
                failed(inner, id, known, &e);
                next = next.min(wait(known.count));
            }
        }
    }
    // How they end is looked at soon, also when nothing else changes.
    if crashes.values().any(|k| k.operation.is_some()) { next.min(LOOK) } else { next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_longer_up_to_a_limit() {
        let waits: Vec<u64> = (1..=10).map(|n| wait(n).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert_eq!(wait(u32::MAX), LONGEST);
    }

    #[test]
    fn a_start_that_fails_is_tried_again_told_of_and_given_up() {
        let mut known = Crashes::default();
        let mut now = Duration::from_secs(1000);
        known.crashed(Generation { incarnation: 1, n: 1 }, "QEMU crashed with signal 11", now);
        assert_eq!((known.count, known.due - now), (1, Duration::from_secs(1)));
        assert_eq!(known.failed(now), (true, false));
        assert_eq!((known.failed(now), known.count), ((true, true), 3));
        let mut tries = 2;
        while known.owed {
            now = known.due;
            known.failed(now);
            tries += 1;
            assert!(tries < 100);
        }
        assert!(tries > 10, "it took {tries} tries");
        known.crashed(Generation { incarnation: 1, n: 2 }, "again", now);
        assert_eq!(known.why, "again");
        assert!(known.owed && known.failed_since.is_none(), "another crash begins afresh");
    }
}
