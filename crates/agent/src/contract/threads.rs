//! Threads of a running machine: those that serve disks come and go, and all run where they are pinned.

use super::*;
use karst_model::threads::{IoThread, Pin, Thread};

/// Of a machine that runs, which is left as it was.
pub(super) async fn of_a_machine(s: &Subject, spec: &GuestSpec) {
    let agent = &s.agent;
    let threads = async || {
        let figures = agent.machine_figures(&s.read(), vec![spec.instance]).await.unwrap().pop().unwrap().1;
        figures.iothreads.into_iter().map(|t| (t.id, t.poll_max_ns)).collect::<Vec<_>>()
    };
    let with = |iothreads: &[IoThread], pins: &[Pin]| {
        let mut changed = spec.clone();
        changed.limits.pins = pins.to_vec();
        if let Some(machine) = &mut changed.machine {
            machine.iothreads = iothreads.to_vec();
        }
        changed
    };
    let update = async |spec: &GuestSpec| agent.guest_update(&s.change(), spec.clone()).await;
    assert_eq!(update(spec).await.unwrap().pending, Vec::<String>::new());
    assert_eq!(threads().await, []);

    let pin = |thread, cpu| Pin { thread, cpus: vec![cpu] };
    let absent = with(&[IoThread::new(1)], &[pin(Thread::Vcpu(0), 4000)]);
    let e = update(&absent).await.unwrap_err();
    assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some("config.limits.cpu.pin.0"), "{e:?}");
    assert_eq!(threads().await, [], "refused before anything was done");

    let pins = [pin(Thread::Vcpu(0), 0), pin(Thread::Emulator, 0), pin(Thread::Io(2), 0)];
    let more = with(&[IoThread::new(1), IoThread { poll_max_ns: Some(4096), ..IoThread::new(2) }], &pins);
    let applied = update(&more).await.unwrap();
    assert!(applied.pending.is_empty(), "{applied:?}");
    assert_eq!(update(&more).await.unwrap(), applied, "twice is once");
    assert_eq!(threads().await, [(1, Some(32_768)), (2, Some(4096))]);

    let fewer = with(&[IoThread { poll_max_ns: Some(0), ..IoThread::new(2) }], &pins[..1]);
    assert!(update(&fewer).await.unwrap().pending.is_empty());
    assert_eq!(threads().await, [(2, Some(0))]);

    // A disk has the thread that it was plugged with until the next start.
    let mut other = fewer.clone();
    other.root.io.thread = Some(2);
    assert_eq!(update(&other).await.unwrap().pending, ["devices.root"]);
    assert_eq!(update(&other).await.unwrap().pending, ["devices.root"], "it still waits");

    assert!(update(spec).await.unwrap().pending.is_empty());
    assert_eq!(threads().await, []);
}
