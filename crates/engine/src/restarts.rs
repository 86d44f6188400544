//! Guests that crashed start again (`boot.autorestart`), each time a little later; one that then runs for a while begins
//! afresh. What an administrator stopped, what shut itself down and what a restart of the host ended are no crashes.

use crate::{Engine, EngineInner, compute::power::PowerRequest, context::Context};
use karst_env::EnvExt;
use karst_model::{
    InstanceId,
    instance::{DesiredPower, ExitReason, Generation, Lifecycle, PowerAction, RuntimeState},
    keys,
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

/// How a guest crashed so far. Kept in memory: a new daemon begins afresh.
struct Crashes {
    generation: Generation,
    /// Crashes in a row, this one included.
    count: u32,
    /// When it is started.
    due: Duration,
    /// Was it, since this crash?
    started: bool,
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

/// Starts what is due; answers when to look again.
async fn round(inner: &Arc<EngineInner>, crashes: &mut HashMap<InstanceId, Crashes>) -> Duration {
    let now = inner.env.monotonic();
    let mut due = vec![];
    let mut next = SWEEP;
    {
        let records = inner.inventory.read();
        crashes.retain(|id, _| records.instances.contains_key(id));
        for instance in records.instances.values() {
            let Some(runtime) = records.runtimes.get(&instance.id) else { continue };
            let crashed = matches!(&runtime.exit, Some(ExitReason::Crashed { detail }) if detail != crate::reconcile::HOST_RESTARTED);
            let wanted = runtime.state == RuntimeState::Stopped
                && crashed
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
            let entry = crashes.entry(instance.id);
            let known = entry.or_insert(Crashes {
                generation: Generation::default(),
                count: 0,
                due: now,
                started: false,
            });
            if known.generation != runtime.generation {
                let calm = now.saturating_sub(known.due) >= RECOVERED;
                known.count = if calm { 1 } else { known.count + 1 };
                known.generation = runtime.generation;
                known.due = now + wait(known.count);
                known.started = false;
            }
            if known.started {
                continue;
            }
            if known.due <= now {
                known.started = true;
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
        match engine.instance_power(&Context::system(), &project, &name, request).await {
            Ok(_) => tracing::info!(instance = %name, "starts again after a crash"),
            Err(e) => {
                tracing::warn!(instance = %name, error = %e, "does not start again after a crash");
                // Tried again, later than before.
                if let Some(c) = crashes.get_mut(&id) {
                    c.count += 1;
                    c.due = now + wait(c.count);
                    c.started = false;
                    next = next.min(wait(c.count));
                }
            }
        }
    }
    next
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
}
