//! Memory of machines in files of their host: saved, restored, broken off, without room, over a crash of the host's process; and a
//! stop that keeps the memory, which is told of and broken off in the same way.

use karst_agent::{Fault, simulated::SimulatedOptions};
use karst_engine::{
    Context,
    compute::{
        create::CreateInstance,
        memory_files::{AfterDump, DumpMemory, METADATA, SaveMemory},
        power::PowerRequest,
    },
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, Result,
    access::{Grant, Principal, Role},
    instance::{InstanceKind, PowerAction, Since, Status},
    memory::{DumpFormat, MemoryPhase},
    operation::OperationState,
};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

const P: &str = "default";
const FILE: &str = "/srv/saves/m.save";

async fn world(env: &SeededEnv) -> World {
    let options = SimulatedOptions { memory_time: Duration::from_secs(10), ..Default::default() };
    let w = World::with(env, options).await.unwrap();
    let config = Config::from([("migration.stateful".into(), "true".into())]);
    let kind = InstanceKind::VirtualMachine;
    let request = CreateInstance { start: true, kind, config, ..container("m") };
    let (_, operation) = w.engine.instance_create(&w.admin, P, request).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
    w.settle().await;
    w
}

fn save(path: &str) -> SaveMemory {
    SaveMemory { path: path.into(), document: "<domain/>".into(), paused: None }
}

fn dump(path: &str, after: AfterDump) -> DumpMemory {
    DumpMemory { path: path.into(), format: DumpFormat::Elf, after }
}

fn status(w: &World) -> Status {
    w.engine.instance(&w.admin, P, "m").unwrap().status
}

async fn saved(w: &World, path: &str) -> Option<Error> {
    let operation = w.engine.machine_save(&w.admin, P, "m", save(path)).await.unwrap();
    w.ended(operation).await.error.clone()
}

async fn restored(w: &World, path: &str, paused: bool) -> Result<()> {
    let operation = w.engine.machine_restore(&w.admin, P, "m", path, paused).await?;
    w.ended(operation).await.error.clone().map_or(Ok(()), Err)
}

#[test]
fn a_machine_goes_on_from_a_file_that_stays() {
    let env = SeededEnv::new(61);
    env.block_on({
        let env = env.clone();
        async move {
            let w = world(&env).await;
            let operation = w.engine.machine_save(&w.admin, P, "m", save(FILE)).await.unwrap();
            env.sleep(Duration::from_secs(5)).await;
            let now = w.engine.memory_writing(&w.admin, P, "m").await.unwrap().unwrap();
            assert_eq!((now.operation, now.kind.as_str()), (operation.id(), "save"));
            assert!(now.state.phase == MemoryPhase::Running && now.state.done > 0, "{now:?}");
            assert!(now.state.done < now.state.total);
            assert_eq!(w.agent.memory_files(), Vec::<String>::new(), "not before it is whole");
            let ended = w.ended(operation).await;
            assert_eq!(ended.error, None);
            assert_eq!(ended.metadata[METADATA]["done"], ended.metadata[METADATA]["total"]);
            w.settle().await;
            assert_eq!((status(&w), w.agent.memory_files()), (Status::Stopped, vec![FILE.to_owned()]));
            assert!(!w.engine.instance(&w.admin, P, "m").unwrap().instance.stateful);
            assert!(w.engine.memory_writing(&w.admin, P, "m").await.unwrap().is_none());

            restored(&w, FILE, false).await.unwrap();
            w.settle().await;
            let view = w.engine.instance(&w.admin, P, "m").unwrap();
            assert_eq!(
                (view.status, view.runtime.as_ref().unwrap().since),
                (Status::Running, Some(Since::Memory))
            );
            let e = restored(&w, FILE, false).await.unwrap_err();
            assert!(e.is(ErrorKind::Conflict), "it runs: {e}");
            assert_eq!(w.agent.memory_files(), [FILE], "it stays");
            // Another machine has another UUID: nothing changes.
            let request = CreateInstance {
                kind: InstanceKind::VirtualMachine,
                config: Config::from([("migration.stateful".into(), "true".into())]),
                ..container("other")
            };
            let (_, operation) = w.engine.instance_create(&w.admin, P, request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
            let operation = w.engine.machine_restore(&w.admin, P, "other", FILE, false).await.unwrap();
            let e = w.ended(operation).await.error.clone().unwrap();
            assert!(e.message.contains("another virtual machine"), "{e}");
            assert_eq!(w.engine.instance(&w.admin, P, "other").unwrap().status, Status::Stopped);
            assert!(w.faults().await.is_empty(), "{:?}", w.faults().await);
            w.engine.close();
        }
    });
}

#[test]
fn what_is_broken_off_or_has_no_room_leaves_the_machine_running_and_no_file() {
    let env = SeededEnv::new(62);
    env.block_on({
        let env = env.clone();
        async move {
            let w = world(&env).await;
            let before = w.fingerprint();
            let operation = w.engine.machine_save(&w.admin, P, "m", save(FILE)).await.unwrap();
            env.sleep(Duration::from_secs(3)).await;
            w.engine.memory_writing_abort(&w.admin, P, "m").await.unwrap();
            assert_eq!(w.ended(operation).await.state, OperationState::Cancelled);
            w.settle().await;
            assert_eq!(w.fingerprint(), before);
            w.agent.set_memory_room(Some(1 << 20));
            let e = saved(&w, FILE).await.unwrap();
            assert!(e.message.contains("not enough room"), "{e}");
            w.agent.set_memory_room(None);
            w.agent.put_foreign_file("/srv/saves/foreign");
            let e = saved(&w, "/srv/saves/foreign").await.unwrap();
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("already"), "{e}");
            let e = saved(&w, "/srv/other/a").await.unwrap();
            assert!(e.is(ErrorKind::Forbidden) && e.message.contains("save_paths"), "{e}");
            w.settle().await;
            assert_eq!(
                (w.fingerprint(), w.agent.memory_files()),
                (before.clone(), vec!["/srv/saves/foreign".into()])
            );

            // Who stops it by force is not kept waiting.
            let operation = w.engine.machine_save(&w.admin, P, "m", save(FILE)).await.unwrap();
            env.sleep(Duration::from_secs(3)).await;
            let stop =
                PowerRequest { action: PowerAction::Stop, force: true, timeout: None, stateful: false };
            let stopped = w.engine.instance_power(&w.admin, P, "m", stop).await.unwrap();
            assert_eq!(w.ended(stopped).await.error, None);
            assert_eq!(w.ended(operation).await.state, OperationState::Cancelled);
            w.settle().await;
            assert_eq!(status(&w), Status::Stopped);
            assert!(w.faults().await.is_empty(), "{:?}", w.faults().await);
            w.engine.close();
        }
    });
}

#[test]
fn a_crash_of_the_hosts_process_or_of_the_machine_loses_nothing() {
    let env = SeededEnv::new(63);
    env.block_on({
        let env = env.clone();
        async move {
            let w = world(&env).await;
            let operation = w.engine.machine_save(&w.admin, P, "m", save(FILE)).await.unwrap();
            env.sleep(Duration::from_secs(3)).await;
            w.agent.inject("machine_memory_state", Fault::CrashBefore);
            w.agent.inject("machine_memory_end", Fault::CrashAfter);
            w.agent.inject("guest_stop", Fault::CrashAfter);
            assert_eq!(w.ended(operation).await.error, None);
            w.settle().await;
            assert_eq!(w.agent.faults_left(), 0);
            assert_eq!((status(&w), w.agent.memory_files()), (Status::Stopped, vec![FILE.to_owned()]));
            restored(&w, FILE, true).await.unwrap();
            w.settle().await;
            assert_eq!(status(&w), Status::Frozen);
            // A machine that dies in the middle is not in a file.
            let id = w.engine.instance(&w.admin, P, "m").unwrap().instance.id;
            let operation = w.engine.machine_save(&w.admin, P, "m", save("/srv/saves/second")).await.unwrap();
            env.sleep(Duration::from_secs(3)).await;
            assert!(w.agent.crash_guest(id));
            let e = w.ended(operation).await.error.clone().unwrap();
            assert!(e.message.contains("ended before"), "{e}");
            w.settle().await;
            assert_eq!((status(&w), w.agent.memory_files()), (Status::Stopped, vec![FILE.to_owned()]));
            assert!(w.faults().await.is_empty(), "{:?}", w.faults().await);
            w.engine.close();
        }
    });
}

#[test]
fn a_dump_leaves_the_machine_as_is_asked_for() {
    let env = SeededEnv::new(64);
    env.block_on({
        let env = env.clone();
        async move {
            let w = world(&env).await;
            for (n, after) in [AfterDump::GoesOn, AfterDump::Reset, AfterDump::Ends].into_iter().enumerate() {
                let request = dump(&format!("/srv/saves/{n}"), after);
                let operation = w.engine.machine_dump(&w.admin, P, "m", request).await.unwrap();
                assert_eq!(w.ended(operation).await.error, None);
                w.settle().await;
                let wanted = if after == AfterDump::Ends { Status::Stopped } else { Status::Running };
                assert_eq!((status(&w), w.agent.memory_files().len()), (wanted, n + 1));
            }
            let e = restored(&w, "/srv/saves/0", false).await.unwrap_err();
            assert!(e.is(ErrorKind::Invalid), "nothing to go on from: {e}");
            assert!(w.faults().await.is_empty(), "{:?}", w.faults().await);
            w.engine.close();
        }
    });
}

#[test]
fn a_stop_that_keeps_the_memory_is_told_of_and_broken_off() {
    let env = SeededEnv::new(65);
    env.block_on({
        let env = env.clone();
        async move {
            let w = world(&env).await;
            let before = w.fingerprint();
            let stop =
                PowerRequest { action: PowerAction::Stop, force: false, timeout: None, stateful: true };
            let operation = w.engine.instance_power(&w.admin, P, "m", stop).await.unwrap();
            env.sleep(Duration::from_secs(4)).await;
            let now = w.engine.memory_writing(&w.admin, P, "m").await.unwrap().unwrap();
            assert!(now.kind == "stop" && now.state.done > 0, "{now:?}");
            w.engine.memory_writing_abort(&w.admin, P, "m").await.unwrap();
            let ended = w.ended(operation).await;
            assert_eq!(ended.state, OperationState::Cancelled);
            assert!(ended.metadata[METADATA]["done"].as_u64().unwrap() > 0, "{:?}", ended.metadata);
            w.settle().await;
            assert_eq!(w.fingerprint(), before, "it goes on");
            let operation = w.engine.instance_power(&w.admin, P, "m", stop).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
            assert!(w.engine.instance(&w.admin, P, "m").unwrap().instance.stateful);
            // It would be of the past when another memory is gone on from.
            let e = restored(&w, FILE, false).await.unwrap_err();
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("keeps memory"), "{e}");
            w.settle().await;
            assert!(w.faults().await.is_empty(), "{:?}", w.faults().await);
            w.engine.close();
        }
    });
}

/// Who may do anything in a project may not name files of the host.
#[test]
fn files_of_the_host_are_for_its_administrators() {
    let env = SeededEnv::new(66);
    env.block_on({
        let env = env.clone();
        async move {
            let w = world(&env).await;
            let project = w.engine.instance(&w.admin, P, "m").unwrap().project.id;
            let grants = vec![Grant { role: Role::Operator, project: Some(project) }];
            let tenant = Context::new(Principal { grants, ..Principal::unix_admin(1, 1, 1) });
            let asked = w.engine.machine_save(&tenant, P, "m", save(FILE)).await;
            assert!(asked.err().is_some_and(|e| e.is(ErrorKind::Forbidden)));
            let asked = w.engine.machine_dump(&tenant, P, "m", dump(FILE, AfterDump::GoesOn)).await;
            assert!(asked.err().is_some_and(|e| e.is(ErrorKind::Forbidden)));
            let asked = w.engine.machine_restore(&tenant, P, "m", FILE, false).await;
            assert!(asked.err().is_some_and(|e| e.is(ErrorKind::Forbidden)));
            assert!(w.engine.memory_file(&tenant, FILE).await.unwrap_err().is(ErrorKind::Forbidden));
            assert_eq!((status(&w), w.agent.memory_files().len()), (Status::Running, 0));
            w.engine.close();
        }
    });
}
