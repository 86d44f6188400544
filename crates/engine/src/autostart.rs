//! What starts with its host: in order, a few at a time, and again while the host cannot do it yet (a disk that comes
//! late, a machine that is busy with all of them). What fails for another reason, or for too long, is given up and is a
//! warning. Who crashed by itself is not here but in [`crate::restarts`].
//!
//! Whom it concerns is for [`crate::reconcile`] to say, with the first look at the host after its boot. Each later look only takes
//! away: who is up by now, or not wanted any more, is not named again, and who is made or stopped meanwhile is left to its user.
//! It is settled when nobody is left; only then the restart of the host is done with.

use crate::{
    Engine, EngineInner, compute::power::PowerRequest, context::Context, operations::LiveOperation, reconcile,
};
use karst_model::{
    Error, ErrorKind, InstanceId, Result,
    instance::PowerAction,
    operation::{Operation, OperationState},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// Before a start is tried again, at first and at most.
const WAITS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// How long one is tried again after it failed first.
const GIVE_UP: Duration = Duration::from_secs(600);
/// Starts at once for each processor of the host, and on the smallest host.
const AT_ONCE: (usize, usize) = (2, 4);
/// How often the host is looked at while starts are under way.
const LOOK: Duration = Duration::from_secs(5);

/// One instance.
#[derive(Debug, Default)]
struct Start {
    /// Before the next one starts.
    delay: Duration,
    /// Under way.
    operation: Option<LiveOperation>,
    failures: u32,
    /// When it failed first.
    since: Duration,
    /// When it is tried again.
    due: Duration,
    /// Started, given up, or taken away.
    settled: bool,
}

/// The starts of one host after one boot. Kept in memory: a daemon that takes over begins anew with who is recorded as left.
#[derive(Debug, Default)]
pub(crate) struct Starts {
    /// Was it said whom it concerns?
    begun: bool,
    why: &'static str,
    at_once: usize,
    known: BTreeMap<InstanceId, Start>,
    /// Who is still to be started, in order.
    queue: Vec<InstanceId>,
    /// The one that was started last asked that no other starts before.
    not_before: Duration,
}

/// The wait after so many failures.
fn wait(failures: u32) -> Duration {
    WAITS.0.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(WAITS.1)
}

impl Starts {
    /// Who is to be started and does not run, in order, each with the time to wait after it. The first time it says whom this
    /// concerns; later it takes away who is not among them.
    pub(crate) fn look(&mut self, candidates: Vec<(InstanceId, Duration)>, cpus: u32, why: &'static str) {
        self.why = why;
        self.at_once = (AT_ONCE.0 * cpus as usize).max(AT_ONCE.1);
        self.queue.clear();
        if !std::mem::replace(&mut self.begun, true) {
            self.known = candidates.iter().map(|(id, _)| (*id, Start::default())).collect();
        }
        let named: BTreeSet<InstanceId> = candidates.iter().map(|(id, _)| *id).collect();
        for (_, gone) in self.known.iter_mut().filter(|(id, s)| s.operation.is_none() && !named.contains(*id))
        {
            gone.settled = true;
        }
        for (id, delay) in candidates {
            let Some(start) = self.known.get_mut(&id) else { continue };
            start.delay = delay;
            if !start.settled && start.operation.is_none() {
                self.queue.push(id);
            }
        }
    }

    /// Looks what became of those under way, and begins others as far as there is room.
    pub(crate) async fn go_on(&mut self, inner: &Arc<EngineInner>) {
        let now = inner.env.monotonic();
        for (id, operation) in self.ended() {
            let start = self.known.entry(id).or_default();
            start.operation = None;
            if operation.state == OperationState::Success {
                start.settled = true;
                continue;
            }
            let nothing = || Error::internal("the start ended without a word", operation.id);
            let error = operation.error.clone().unwrap_or_else(nothing);
            if self.failed(inner, id, &error, now) {
                self.queue.push(id);
            }
        }
        let mut under_way = self.count();
        for id in std::mem::take(&mut self.queue) {
            let (due, delay) = self.known.get(&id).map_or_else(Default::default, |s| (s.due, s.delay));
            // Who is at work on it may be what the restart interrupted; that ends, and then it is free.
            if under_way >= self.at_once || self.not_before.max(due) > now || reconcile::at_work(inner, id) {
                self.queue.push(id);
                continue;
            }
            match begin(inner, id, self.why).await {
                Ok(operation) => {
                    under_way += usize::from(operation.is_some());
                    self.not_before = now.saturating_add(delay);
                    let start = self.known.entry(id).or_default();
                    // Without one it is gone.
                    start.settled = operation.is_none();
                    start.operation = operation;
                }
                Err(e) => {
                    if self.failed(inner, id, &e, now) {
                        self.queue.push(id);
                    }
                }
            }
        }
    }

    fn ended(&self) -> Vec<(InstanceId, Arc<Operation>)> {
        let under_way = self.known.iter().filter_map(|(id, s)| Some((*id, s.operation.as_ref()?.snapshot())));
        under_way.filter(|(_, operation)| operation.state.is_final()).collect()
    }

    /// Notes a failure. Is it tried again?
    fn failed(&mut self, inner: &EngineInner, id: InstanceId, error: &Error, now: Duration) -> bool {
        let start = self.known.entry(id).or_default();
        if start.failures == 0 {
            start.since = now;
        }
        start.failures += 1;
        start.due = now + wait(start.failures);
        let passes = matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Timeout);
        start.settled = !passes || start.due.saturating_sub(start.since) > GIVE_UP;
        let why = self.why;
        if start.settled {
            tracing::warn!(instance = %id, %error, "does not start {why}");
            let mut unstarted = inner.unstarted.lock().unwrap_or_else(|e| e.into_inner());
            let text = format!("was to start with its host and does not: {}", error.message);
            unstarted.insert(id, text);
        } else {
            tracing::warn!(instance = %id, %error, wait = ?wait(start.failures), "does not start {why}; trying again");
        }
        !start.settled
    }

    fn count(&self) -> usize {
        self.known.values().filter(|s| s.operation.is_some()).count()
    }

    /// Are starts under way? Then [`Self::go_on`] is to be called again soon.
    pub(crate) fn are_under_way(&self) -> bool {
        self.count() > 0
    }

    /// Who neither runs yet nor is given up.
    pub(crate) fn left(&self) -> BTreeSet<InstanceId> {
        self.known.iter().filter(|(_, s)| !s.settled).map(|(id, _)| *id).collect()
    }

    /// Is nothing left to be done?
    pub(crate) fn are_settled(&self) -> bool {
        self.queue.is_empty() && !self.are_under_way()
    }

    /// When to look at the host again, from `now`; `None` when nothing is left to be done.
    pub(crate) fn next(&self, now: Duration) -> Option<Duration> {
        if self.are_under_way() {
            return Some(LOOK);
        }
        let due = |id: &InstanceId| self.known.get(id).map_or(now, |s| s.due).max(self.not_before);
        self.queue.iter().map(|id| due(id).saturating_sub(now)).min()
    }
}

/// Begins a start; `None` when the instance is gone.
async fn begin(inner: &Arc<EngineInner>, id: InstanceId, why: &str) -> Result<Option<LiveOperation>> {
    let (project, name) = {
        let records = inner.inventory.read();
        let Some(i) = records.instances.get(&id) else { return Ok(None) };
        let Some(p) = records.projects.get(&i.project) else { return Ok(None) };
        (p.name.to_string(), i.name.to_string())
    };
    let engine = Engine { inner: inner.clone() };
    let request = PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful: true };
    let operation = engine.instance_power(&Context::system(), &project, &name, request).await?;
    tracing::info!(instance = %name, "starts {why}");
    Ok(Some(operation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_longer_up_to_a_limit() {
        let waits: Vec<u64> = (1..=8).map(|n| wait(n).as_secs()).collect();
        assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(wait(u32::MAX), WAITS.1);
    }

    #[test]
    fn later_looks_only_take_away() {
        let [a, b, c] = [1, 2, 3].map(|n| InstanceId(uuid::Uuid::from_u128(n)));
        let named = |ids: &[InstanceId]| ids.iter().map(|id| (*id, Duration::ZERO)).collect::<Vec<_>>();
        let mut starts = Starts::default();
        starts.look(named(&[b, a]), 1, "again");
        assert_eq!((&starts.queue, starts.left()), (&vec![b, a], BTreeSet::from([a, b])));
        starts.look(named(&[c, a]), 1, "again");
        assert_eq!((&starts.queue, starts.left()), (&vec![a], BTreeSet::from([a])));
        // Somebody started it, and stopped it.
        starts.look(named(&[a, b]), 1, "again");
        assert_eq!(starts.queue, [a]);
        starts.look(vec![], 1, "again");
        assert!(starts.are_settled() && starts.left().is_empty());
    }
}
