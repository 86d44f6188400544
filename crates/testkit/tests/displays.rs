//! Passwords of displays: sealed where they are kept, brought along with each viewer, gone with the machine.

use karst_engine::{
    Context, Engine,
    compute::{create::CreateInstance, power::PowerRequest},
    secrets::SecretKey,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    ErrorKind, InstanceId,
    access::{Grant, Permission, Principal, Role},
    display::{DisplayGuard, DisplayPassword, DisplayProtocol},
    instance::{InstanceKind, PowerAction},
};
use karst_store::{ROOT, list_prefix};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

fn key(engine: &Engine, n: u8) {
    engine.set_secret_key(SecretKey::new(&[n; 32]).unwrap());
}

fn guard(text: &str) -> DisplayGuard {
    DisplayGuard { password: DisplayPassword::parse("password", text.into()).unwrap(), valid_to: None }
}

/// A machine that does not run.
async fn machine(w: &World, name: &str) -> InstanceId {
    let new = CreateInstance { kind: InstanceKind::VirtualMachine, ..container(name) };
    let (_, operation) = w.engine.instance_create(&w.admin, "default", new).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
    w.engine.instance(&w.admin, "default", name).unwrap().instance.id
}

async fn power(w: &World, name: &str, action: PowerAction) {
    let request = PowerRequest { action, force: true, timeout: None, stateful: false };
    let operation = w.engine.instance_power(&w.admin, "default", name, request).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
}

/// Everything that the store holds.
async fn kept(w: &World) -> String {
    let (all, _) = list_prefix(w.engine.inner().db.store(), ROOT).await.unwrap();
    all.iter().map(|kv| format!("{} {}\n", kv.key, String::from_utf8_lossy(&kv.value))).collect()
}

#[test]
fn passwords_are_sealed_changed_live_and_go_with_their_machine() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        let id = machine(&w, "v1").await;
        // Without a key nothing is taken, and nothing changes.
        let lost = e.display_password_set(c, "default", "v1", Some(guard("opensesa"))).await.unwrap_err();
        assert_eq!(lost.kind, ErrorKind::Unavailable);
        assert!(!e.display_state(c, "default", "v1").unwrap().password);
        key(e, 7);
        e.display_password_set(c, "default", "v1", Some(guard("opensesa"))).await.unwrap();
        assert_eq!(e.display_password(c, "default", "v1").unwrap(), Some(guard("opensesa")));
        let text = kept(&w).await;
        assert!(text.contains("display-locks"), "{text}");
        assert!(!text.contains("opensesa") && !text.contains("b3BlbnNlc2"), "neither plain nor base64");
        // One that stands still need not be told; one that runs is, at once.
        assert_eq!(w.agent.guard_of_display(id), None);
        power(&w, "v1", PowerAction::Start).await;
        assert_eq!(w.agent.guard_of_display(id), None, "it comes along with the first viewer");
        let none = e.machine_display(c, "default", "v1", DisplayProtocol::Spice, false).await.map(drop);
        let none = none.unwrap_err();
        assert!(
            none.kind == ErrorKind::Unsupported && none.message.contains("hardware.spice=true"),
            "{none}"
        );
        assert_eq!(w.agent.guard_of_display(id), None, "who is not let in changes nothing");
        e.display_password_set(c, "default", "v1", Some(guard("changed"))).await.unwrap();
        assert_eq!(w.agent.guard_of_display(id), Some(guard("changed")));
        // Another key opens nothing, and nobody is let in without a password instead.
        key(e, 8);
        let lost =
            e.machine_display(c, "default", "v1", DisplayProtocol::Vnc, false).await.map(drop).unwrap_err();
        assert!(lost.kind == ErrorKind::Unavailable && lost.message.contains("set it again"), "{lost}");
        key(e, 7);
        e.display_password_set(c, "default", "v1", None).await.unwrap();
        assert_eq!(w.agent.guard_of_display(id), None);
        assert!(!kept(&w).await.contains("display-locks"));
        // A host that refuses leaves the record as it was.
        w.agent
            .inject("display_guard", karst_agent::Fault::FailBefore(karst_model::Error::conflict("too old")));
        let old = e.display_password_set(c, "default", "v1", Some(guard("x"))).await.unwrap_err();
        assert_eq!(old.kind, ErrorKind::Conflict);
        assert!(!e.display_state(c, "default", "v1").unwrap().password);
        // It goes with the machine.
        e.display_password_set(c, "default", "v1", Some(guard("x"))).await.unwrap();
        power(&w, "v1", PowerAction::Stop).await;
        let deleted = e.instance_delete(c, "default", "v1").await.unwrap();
        assert_eq!(w.ended(deleted).await.error, None);
        assert!(!kept(&w).await.contains("display-locks"));
    });
}

#[test]
fn one_that_is_over_lets_nobody_in_but_who_may_change_it() {
    SeededEnv::run(2, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        key(e, 7);
        let id = machine(&w, "v1").await;
        power(&w, "v1", PowerAction::Start).await;
        let end = w.env.now() + Duration::from_secs(60);
        let ends = DisplayGuard { valid_to: Some(end), ..guard("brief") };
        e.display_password_set(c, "default", "v1", Some(ends.clone())).await.unwrap();
        assert_eq!(w.agent.guard_of_display(id), Some(ends));
        assert_eq!(e.display_state(c, "default", "v1").unwrap().valid_to, Some(end));
        w.env.sleep(Duration::from_secs(61)).await;
        let over =
            e.machine_display(c, "default", "v1", DisplayProtocol::Vnc, false).await.map(drop).unwrap_err();
        assert!(over.kind == ErrorKind::Conflict && over.message.contains("set a new one"), "{over}");
        // Who only uses the machine is asked, whatever he says.
        let project = e.project(c, "default", Permission::ProjectView).unwrap().id;
        let grants = vec![Grant { role: Role::User, project: Some(project) }];
        let user = Context::new(Principal { grants, ..Principal::unix_admin(4242, 4242, 1) });
        let over = e
            .machine_display(&user, "default", "v1", DisplayProtocol::Vnc, true)
            .await
            .map(drop)
            .unwrap_err();
        assert_eq!(over.kind, ErrorKind::Conflict, "{over}");
        let kept = e.display_password(&user, "default", "v1").unwrap_err();
        assert_eq!(kept.kind, ErrorKind::Forbidden);
        // A container has no display.
        let (_, made) = e.instance_create(c, "default", container("c1")).await.unwrap();
        assert_eq!(w.ended(made).await.error, None);
        let none = e.display_password_set(c, "default", "c1", Some(guard("x"))).await.unwrap_err();
        assert_eq!(none.kind, ErrorKind::Unsupported);
        assert!(!e.display_state(c, "default", "c1").unwrap().there);
    });
}
