//! Snapshots that are taken and go by themselves: `snapshots.schedule`, the time at which each expires, and
//! `snapshots.keep`. A reconciler without inputs, by the clock of the environment; times are UTC. What was due while no daemon
//! ran is not made up for, and what is due again while it still waits or is taken is taken once.
//!
//! After each that the schedule took, its oldest beyond the number go. They are told by the mark in their record, not by
//! their names; what could not go then, or was left by a daemon that ended, goes after the next one.
//!
//! Nobody waits for others' snapshots: several are taken at once, of a project only so many, and what has expired goes beside
//! that by places of its own. Of one instance or volume one thing is done at a time, in the order in which it was due.

use super::{Found, Origin, Row2, create::CreateSnapshot};
use crate::{
    Engine, EngineInner, Records,
    context::Context,
    tenancy::{restricted, rules::ProjectRules},
    volumes,
};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use karst_model::{
    Config, Error, ErrorKind, PoolId, ProjectId, Result,
    instance::{Instance, Lifecycle},
    keys::parse_bool,
    schedule::{Schedule, minute_before, parse_keep},
    storage::{Volume, VolumeOwner},
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Weak,
    time::Duration,
};

/// How often the clock is looked at; a minute of the calendar is never missed.
const LOOK: Duration = Duration::from_secs(15);
/// Snapshots that are taken at once, and as many that are deleted.
const AT_ONCE: usize = 16;
/// Of these in one pool: what is slow there leaves places for others.
const OF_A_POOL: usize = 8;
/// Of these in one project.
const OF_A_PROJECT: usize = 2;
/// Expired snapshots of a project that wait at once.
const WAITING: usize = 1024;

/// Something with snapshots, by names that outlive the reading of the records.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Named {
    project: String,
    pool: Option<String>,
    name: String,
}

impl Named {
    fn origin(&self) -> Origin<'_> {
        match &self.pool {
            None => Origin::Instance { project: &self.project, name: &self.name },
            Some(pool) => Origin::Volume { project: &self.project, pool, name: &self.name },
        }
    }
}

/// What is to be done of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Work {
    /// A snapshot is taken.
    Take,
    /// That of this name goes.
    Delete(String),
    /// Those of the schedule that are too many go.
    Thin,
}

impl Work {
    /// Is one as much taken, or deleted, as the other?
    fn is_like(&self, other: &Self) -> bool {
        matches!(self, Self::Take) == matches!(other, Self::Take)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Due {
    named: Named,
    /// Where it is.
    place: PoolId,
    work: Work,
}

impl Due {
    /// Does it; the second is what is to be done next because of it.
    async fn done(self, engine: Engine) -> (Self, Option<Self>) {
        let context = Context::system();
        let origin = self.named.origin();
        let mut next = None;
        let (what, done) = match &self.work {
            Work::Take => {
                let request = CreateSnapshot { automatic: true, ..CreateSnapshot::default() };
                let taken = ended(engine.snapshot_create(&context, origin, request).await).await;
                let too_many = taken.is_ok() && !surplus(&engine, origin).is_empty();
                next = too_many.then(|| Self { work: Work::Thin, ..self.clone() });
                ("a scheduled snapshot was not taken", taken)
            }
            Work::Delete(snapshot) => {
                let env = engine.inner().env.clone();
                // While this waited somebody may have kept it for longer, or another one has got its name.
                let expired = move |_: &Records, _: &Found, row: &Row2| {
                    row.expires_at().is_some_and(|time| time <= env.now())
                };
                let deleted =
                    ended(engine.snapshot_delete_if(&context, origin, snapshot, expired).await).await;
                ("an expired snapshot was not deleted", deleted)
            }
            Work::Thin => {
                let mut deleted = Ok(());
                for snapshot in surplus(&engine, origin) {
                    let env = engine.inner().env.clone();
                    // As above: what somebody has made his own meanwhile stays.
                    let many = move |records: &Records, found: &Found, row: &Row2| {
                        too_many(records, found, env.now()).iter().any(|one| one.id() == row.id())
                    };
                    let one = ended(engine.snapshot_delete_if(&context, origin, &snapshot, many).await).await;
                    // One that cannot go keeps none of the others.
                    deleted = deleted.and(one);
                }
                ("a snapshot beyond snapshots.keep was not deleted", deleted)
            }
        };
        report(&self.named, what, done);
        (self, next)
    }
}

/// What waits, and what is done now.
#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Due>,
    running: Vec<Due>,
    /// Both.
    known: HashSet<Due>,
    /// Snapshots of a project that wait to go.
    expired: HashMap<String, usize>,
}

impl Queue {
    fn add(&mut self, due: Due) {
        if self.known.contains(&due) {
            return;
        }
        if let Work::Delete(_) = due.work {
            let waiting = self.expired.entry(due.named.project.clone()).or_default();
            // The rest is found again by the next look.
            if *waiting >= WAITING {
                return;
            }
            *waiting += 1;
        }
        self.known.insert(due.clone());
        self.waiting.push_back(due);
    }

    /// The first for which there is a place.
    fn take(&mut self) -> Option<Due> {
        let at = (0..self.waiting.len()).find(|at| self.has_place(*at))?;
        let due = self.waiting.remove(at)?;
        if let (Work::Delete(_), Some(waiting)) = (&due.work, self.expired.get_mut(&due.named.project)) {
            *waiting -= 1;
        }
        self.running.push(due.clone());
        Some(due)
    }

    fn has_place(&self, at: usize) -> bool {
        let due = &self.waiting[at];
        let busy = |other: &Due| other.named == due.named;
        let alike = || self.running.iter().filter(|r| r.work.is_like(&due.work));
        alike().count() < AT_ONCE
            && alike().filter(|r| r.place == due.place).count() < OF_A_POOL
            && alike().filter(|r| r.named.project == due.named.project).count() < OF_A_PROJECT
            && !self.running.iter().any(busy)
            && !self.waiting.iter().take(at).any(busy)
    }

    fn end(&mut self, due: &Due) {
        self.running.retain(|r| r != due);
        self.known.remove(due);
    }
}

/// Follows the clock until the engine ends.
pub(crate) async fn follow(weak: Weak<EngineInner>) {
    let Some(inner) = weak.upgrade() else { return };
    let env = inner.env.clone();
    let mut last = minute_before(env.now());
    drop(inner);
    let mut queue = Queue::default();
    let mut running: FuturesUnordered<BoxFuture<'static, (Due, Option<Due>)>> = FuturesUnordered::new();
    loop {
        {
            let Some(inner) = weak.upgrade() else { return };
            let now = env.now();
            let records = inner.inventory.read();
            let all = due(&records, last, now).into_iter().chain(expired(&records, now));
            all.for_each(|due| queue.add(due));
            last = last.max(now);
        }
        let mut look = env.sleep(LOOK);
        loop {
            while let Some(due) = queue.take() {
                let Some(inner) = weak.upgrade() else { return };
                running.push(due.done(Engine { inner }).boxed());
            }
            tokio::select! {
                biased;
                Some((due, next)) = running.next(), if !running.is_empty() => {
                    queue.end(&due);
                    next.into_iter().for_each(|due| queue.add(due));
                }
                () = &mut look => break,
            }
        }
    }
}

async fn ended(operation: Result<crate::LiveOperation>) -> Result<()> {
    match &operation?.ended().await.error {
        Some(e) => Err(e.clone()),
        None => Ok(()),
    }
}

fn report(named: &Named, what: &str, done: Result<()>) {
    match done {
        Ok(()) => {}
        // Busy or gone meanwhile: the next look, or the next time, will do.
        Err(e) if matches!(e.kind, ErrorKind::Conflict | ErrorKind::NotFound) => {
            tracing::info!(name = %named.name, error = %e, "{what}");
        }
        Err(e) => tracing::warn!(name = %named.name, error = %e, "{what}"),
    }
}

fn project_name(records: &Records, id: ProjectId) -> Option<String> {
    records.projects.get(&id).map(|p| p.name.to_string())
}

fn schedule(config: &Config) -> Option<Schedule> {
    let text = config.get("snapshots.schedule").filter(|v| !v.is_empty())?;
    Schedule::parse("config.snapshots.schedule", text).ok()
}

/// May snapshots be taken in the project? Where not, a schedule waits until they may.
fn allowed(records: &Records, project: ProjectId) -> bool {
    let rules = records.projects.get(&project).and_then(|p| ProjectRules::parse(&p.config).ok());
    rules.is_some_and(|r| restricted::check_snapshot(&r).is_ok())
}

/// Names of the snapshots of the schedule beyond `snapshots.keep`, oldest first. Those of users are neither counted nor named.
fn surplus(engine: &Engine, origin: Origin<'_>) -> Vec<String> {
    let records = engine.inner().inventory.read();
    let project = records.project(origin.project());
    let Ok(found) = project.and_then(|project| origin.find(&records, project.id)) else { return vec![] };
    let all = too_many(&records, &found, engine.inner().env.now());
    all.iter().map(|s| s.name().to_owned()).collect()
}

/// As [`surplus`], of what was found.
fn too_many(records: &Records, found: &Found, now: Timestamp) -> Vec<Row2> {
    let config = found.config(records);
    let Some(text) = config.get("snapshots.keep").filter(|v| !v.is_empty()) else { return vec![] };
    let Ok(keep) = parse_keep("config.snapshots.keep", text) else { return vec![] };
    let mut all = found.taken(records);
    all.retain(Row2::scheduled);
    // Those that a clock which was ahead has dated are older than what was taken since: else the newest would go each time.
    all.sort_by_key(|s| (s.created_at() <= now, s.created_at()));
    all.truncate(all.len().saturating_sub(keep));
    all
}

/// What a snapshot is due of, between two looks.
fn due(records: &Records, last: Timestamp, now: Timestamp) -> Vec<Due> {
    let mut found = vec![];
    for instance in records.instances.values().filter(|i| i.lifecycle == Lifecycle::Ready) {
        let chance = instance.config.contains_key("snapshots.schedule")
            || instance.profiles.iter().any(|p| {
                records.profiles.get(p).is_some_and(|p| p.config.contains_key("snapshots.schedule"))
            });
        if !chance {
            continue;
        }
        let config = records.expanded(instance).0;
        let Some(schedule) = schedule(&config) else { continue };
        let runs = volumes::runs(records, instance);
        let stopped_too = config
            .get("snapshots.schedule.stopped")
            .is_some_and(|v| parse_bool("config.snapshots.schedule.stopped", v).unwrap_or(false));
        let started = records.runtimes.get(&instance.id).and_then(|r| r.started_at);
        let began = schedule.at_startup && runs && started.is_some_and(|t| t > last && t <= now);
        let time = began || ((runs || stopped_too) && schedule.is_due(last, now));
        if time && allowed(records, instance.project) {
            found.push(Due { work: Work::Take, ..of_instance(records, instance) });
        }
    }
    for volume in records.volumes.values().filter(|v| v.owner == VolumeOwner::Custom) {
        let time = schedule(&volume.config).is_some_and(|s| s.is_due(last, now));
        if time && allowed(records, volume.project) {
            found.push(Due { work: Work::Take, ..of_volume(records, volume) });
        }
    }
    found
}

/// What has expired.
fn expired(records: &Records, now: Timestamp) -> Vec<Due> {
    let over = |t: Option<Timestamp>| t.is_some_and(|t| t <= now);
    let mut found = vec![];
    for snapshot in records.snapshots.values().filter(|s| over(s.expires_at)) {
        if let Some(instance) = records.instances.get(&snapshot.instance) {
            let work = Work::Delete(snapshot.name.to_string());
            found.push(Due { work, ..of_instance(records, instance) });
        }
    }
    for snapshot in records.volume_snapshots.values().filter(|s| over(s.expires_at)) {
        if let Some(volume) = records.volumes.get(&snapshot.volume) {
            let work = Work::Delete(snapshot.name.to_string());
            found.push(Due { work, ..of_volume(records, volume) });
        }
    }
    found
}

fn of_instance(records: &Records, instance: &Instance) -> Due {
    let project = project_name(records, instance.project).unwrap_or_default();
    let named = Named { project, pool: None, name: instance.name.to_string() };
    Due { named, place: instance.pool, work: Work::Take }
}

fn of_volume(records: &Records, volume: &Volume) -> Due {
    let pool = records.pools.get(&volume.pool).map(|p| p.name.to_string());
    let project = project_name(records, volume.project).unwrap_or_default();
    Due { named: Named { project, pool, name: volume.name.clone() }, place: volume.pool, work: Work::Take }
}

impl Found {
    /// Conflict when it is no longer there in its own right (being made or deleted).
    pub(crate) fn demand_ready(&self) -> Result<()> {
        match self {
            Self::Instance(row) if row.lifecycle != Lifecycle::Ready => {
                Err(Error::conflict(format!("{} is being made or deleted", self.words())))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(project: &str, name: &str, work: Work) -> Due {
        let named = Named { project: project.into(), pool: None, name: name.into() };
        Due { named, place: PoolId(uuid::Uuid::nil()), work }
    }

    fn names(queue: &mut Queue) -> Vec<String> {
        std::iter::from_fn(|| queue.take()).map(|d| d.named.name).collect()
    }

    #[test]
    fn of_a_project_only_so_many_are_taken_at_once() {
        let mut queue = Queue::default();
        for name in ["a1", "a2", "a3", "a4"] {
            queue.add(of("a", name, Work::Take));
        }
        queue.add(of("b", "b1", Work::Take));
        assert_eq!(names(&mut queue), ["a1", "a2", "b1"], "others do not wait");
        queue.add(of("a", "a1", Work::Take));
        queue.end(&of("a", "a2", Work::Take));
        assert_eq!(names(&mut queue), ["a3"]);
        queue.end(&of("a", "a1", Work::Take));
        queue.end(&of("a", "a3", Work::Take));
        assert_eq!(names(&mut queue), ["a4"], "what is taken is not due again");
    }

    #[test]
    fn what_has_expired_goes_beside_what_is_taken() {
        let mut queue = Queue::default();
        for name in ["a1", "a2", "a3"] {
            queue.add(of("a", name, Work::Take));
        }
        queue.add(of("a", "a1", Work::Delete("s1".into())));
        queue.add(of("a", "a3", Work::Delete("s1".into())));
        queue.add(of("a", "a4", Work::Delete("s1".into())));
        queue.add(of("a", "a4", Work::Delete("s2".into())));
        assert_eq!(names(&mut queue), ["a1", "a2", "a4"], "of one thing one at a time, in order");
        queue.end(&of("a", "a4", Work::Delete("s1".into())));
        queue.end(&of("a", "a1", Work::Take));
        let next = std::iter::from_fn(|| queue.take()).map(|d| (d.named.name, d.work));
        let delete = |snapshot: &str| Work::Delete(snapshot.into());
        let expected = [("a3", Work::Take), ("a1", delete("s1")), ("a4", delete("s2"))];
        assert_eq!(next.collect::<Vec<_>>(), expected.map(|(n, w)| (n.to_owned(), w)));
    }

    #[test]
    fn what_is_too_much_goes_by_the_places_of_what_goes() {
        let mut queue = Queue::default();
        for name in ["a1", "a2", "a3"] {
            queue.add(of("a", name, Work::Thin));
        }
        queue.add(of("a", "a1", Work::Thin));
        queue.add(of("a", "a1", Work::Take));
        queue.add(of("a", "a4", Work::Take));
        queue.add(of("a", "a5", Work::Delete("s1".into())));
        assert_eq!(names(&mut queue), ["a1", "a2", "a4"]);
        queue.end(&of("a", "a1", Work::Thin));
        let next = std::iter::from_fn(|| queue.take()).map(|d| (d.named.name, d.work));
        let expected = [("a3", Work::Thin), ("a1", Work::Take)].map(|(n, w)| (n.to_owned(), w));
        assert_eq!(next.collect::<Vec<_>>(), expected, "once each");
    }

    #[test]
    fn a_project_with_much_that_expired_keeps_nobody_waiting() {
        let mut queue = Queue::default();
        for n in 0..2 * WAITING {
            queue.add(of("a", "a1", Work::Delete(format!("s{n}"))));
        }
        queue.add(of("b", "b1", Work::Delete("s0".into())));
        queue.add(of("a", "a1", Work::Take));
        assert_eq!(queue.waiting.len(), WAITING + 2, "what is to be taken is never left out");
        assert_eq!(names(&mut queue), ["a1", "b1"]);
        queue.end(&of("a", "a1", Work::Delete("s0".into())));
        queue.add(of("a", "a1", Work::Delete("more".into())));
        assert_eq!(queue.waiting.len(), WAITING + 1);
    }

    #[test]
    fn one_pool_does_not_take_all_places() {
        let mut queue = Queue::default();
        for n in 0..AT_ONCE {
            queue.add(of(&format!("p{n}"), "slow", Work::Take));
        }
        assert_eq!(names(&mut queue).len(), OF_A_POOL);
        let elsewhere = PoolId(uuid::Uuid::from_u128(1));
        for n in 0..2 * AT_ONCE {
            queue.add(Due { place: elsewhere, ..of(&format!("q{n}"), "quick", Work::Take) });
        }
        assert_eq!(names(&mut queue), vec!["quick"; OF_A_POOL]);
        assert_eq!(queue.running.len(), AT_ONCE);
    }
}
