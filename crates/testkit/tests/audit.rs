//! The audit log over daemons that are killed between a change and its entry: no change is missing, what may be is said, and what
//! is kept for that in the store costs a request nothing and goes.

use karst_agent::{CallContext, simulated::Fault};
use karst_engine::{
    audit::{Asked, AuditRequest},
    compute::create::CreateInstance,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error,
    audit::{AuditEntry, AuditRange},
};
use karst_store::list_prefix;
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

async fn log(w: &World) -> Vec<AuditEntry> {
    let context = CallContext::read(Duration::from_secs(10));
    let page = w.host().audit_read(&context, AuditRange { from: 1, limit: 1000 }).await.unwrap();
    page.into_iter().map(|record| record.entry).collect()
}

/// Waits for an entry, at most two virtual minutes.
async fn until(w: &World, what: &str, holds: impl Fn(&AuditEntry) -> bool) -> Vec<AuditEntry> {
    for _ in 0..1200 {
        let log = log(w).await;
        if log.iter().any(&holds) {
            return log;
        }
        w.env.sleep(Duration::from_millis(100)).await;
    }
    panic!("never: {what}: {:#?}", log(w).await);
}

async fn stored(w: &World) -> usize {
    list_prefix(&*w.store, "/karst/v1/audit/").await.unwrap().0.len()
}

fn asked(w: &World, object: &str) -> Asked {
    w.engine.audit_asked(&w.admin, "request POST", object, "default")
}

fn answer(object: &str, outcome: &'static str) -> AuditRequest {
    AuditRequest {
        what: "request POST".into(),
        object: object.into(),
        project: "default".into(),
        outcome,
        detail: String::new(),
    }
}

fn of<'a>(log: &'a [AuditEntry], object: &str) -> Vec<&'a AuditEntry> {
    log.iter().filter(|e| e.what == "request POST" && e.object == object).collect()
}

async fn make(w: &World, name: &str) {
    w.engine.project_create(&w.admin, name, "", Config::new()).await.unwrap();
}

#[test]
fn no_change_is_missing_after_a_kill() {
    SeededEnv::run(51, |env| async move {
        let mut w = World::new(&env).await.unwrap();
        // Its log is open by now.
        w.settle().await;
        assert_eq!(list_prefix(&*w.store, "/karst/v1/meta/audit/").await.unwrap().0.len(), 1);
        // The host takes none any more: all that follows is in memory alone when the daemon is killed.
        for _ in 0..40 {
            w.agent.inject("audit_append", Fault::FailBefore(Error::unavailable("not now")));
        }
        let answered = asked(&w, "/answered");
        answered.during(make(&w, "p1")).await;
        answered.ended(answer("/answered", "done"));
        // Its client has gone.
        let dropped = asked(&w, "/dropped");
        dropped.during(make(&w, "p2")).await;
        drop(dropped);
        // It is killed before there is an answer.
        let unanswered = asked(&w, "/unanswered");
        unanswered.during(make(&w, "p3")).await;
        let (_, operation) = w.engine.instance_create(&w.admin, "default", container("c1")).await.unwrap();
        let created = format!("/1.0/operations/{}", operation.id());
        assert_eq!(w.ended(operation).await.error, None);
        w.engine.audit(&w.admin, answer("/refused", "refused"));
        assert!(of(&log(&w).await, "/answered").is_empty(), "nothing is in the log yet");
        w.reopen().await.unwrap();
        // What the first daemon would say now is not heard.
        drop(unanswered);

        let all = until(&w, "what was left", |e| e.object == "/unanswered").await;
        for object in ["/answered", "/dropped", "/unanswered"] {
            let found = of(&all, object);
            assert_eq!(found.len(), 1, "{object}: {all:#?}");
            assert_eq!((found[0].outcome.as_str(), found[0].project.as_str()), ("done", "default"));
            assert!(found[0].detail.contains("ended before"), "{:?}", found[0]);
            assert_eq!(found[0].who, w.admin.principal().identity.describe());
        }
        let ended = |all: &[AuditEntry]| all.iter().filter(|e| e.object == created).count();
        let all = until(&w, "the end of the operation", |e| e.object == created).await;
        assert_eq!(ended(&all), 1);
        let marks = |all: &[AuditEntry]| all.iter().filter(|e| e.detail.contains("was killed")).count();
        assert_eq!(marks(&all), 1, "what may be missing is said: {all:#?}");
        assert!(of(&all, "/refused").is_empty(), "a refusal is nobody's change");
        w.settle().await;
        w.env.sleep(Duration::from_secs(10)).await;
        assert_eq!(stored(&w).await, 0, "the store does not keep what the log has");

        // Another kill brings nothing a second time; an orderly end leaves nothing to be said.
        w.reopen().await.unwrap();
        let all = until(&w, "another mark", |e| e.detail.contains("was killed")).await;
        w.settle().await;
        assert_eq!((of(&all, "/answered").len(), ended(&log(&w).await)), (1, 1));
        let before = marks(&log(&w).await);
        w.engine.audit_flush(Duration::from_secs(60)).await.unwrap();
        w.reopen().await.unwrap();
        w.settle().await;
        assert_eq!(marks(&log(&w).await), before);
        let verdict = &w.engine.audit_verify(&w.admin).await.unwrap()[0].1;
        assert_eq!(verdict.fault, None);
        w.engine.close();
    });
}

#[test]
fn an_audited_change_waits_for_the_disk_once() {
    SeededEnv::run(52, |env| async move {
        let w = World::new(&env).await.unwrap();
        w.env.sleep(Duration::from_secs(10)).await;
        let before = w.store.sync_count();
        for n in 0..50 {
            let (name, object) = (format!("p{n}"), format!("/p{n}"));
            let request = asked(&w, &object);
            request.during(make(&w, &name)).await;
            request.ended(answer(&object, "done"));
        }
        let cost = w.store.sync_count() - before;
        assert!(cost <= 52, "50 changes cost {cost} syncs");
        w.env.sleep(Duration::from_secs(10)).await;
        // Definitions have their operations, and nothing beside them.
        let before = w.store.sync_count();
        let request = asked(&w, "/c1");
        let create = CreateInstance { start: false, ..container("c1") };
        let made = request.during(w.engine.instance_create(&w.admin, "default", create)).await;
        request.ended(answer("/c1", "accepted"));
        assert_eq!(w.ended(made.unwrap().1).await.error, None);
        assert_eq!(w.store.sync_count() - before, 2);
        w.env.sleep(Duration::from_secs(10)).await;
        assert_eq!(stored(&w).await, 0, "they went, many at once");
        let all = log(&w).await;
        assert_eq!((0..50).filter(|n| of(&all, &format!("/p{n}")).len() == 1).count(), 50);
        w.engine.close();
    });
}
