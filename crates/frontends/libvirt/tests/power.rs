//! Power: how a domain begins, and what of it stays when it begins anew.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{PATIENCE, Server, argument};
use karst_agent::{AgentEvent, Fault, HostAgent};
use karst_engine::{
    Context,
    compute::create::{CreateInstance, InstanceSource},
    volumes::create::CreateVolume,
};
use karst_frontend_libvirt::{error::Code, xdr::Reader};
use karst_model::{
    Config, Error,
    access::Principal,
    instance::{DesiredPower, HaltReason, InstanceKind, RuntimeState, Status},
    storage::VolumeContent,
};
use tokio::sync::mpsc::Receiver;

const START_WITH_FLAGS: i32 = 196;
const CREATE_XML: i32 = 10;
const SUSPEND: i32 = 34;
const RESUME: i32 = 28;
const DESTROY: i32 = 12;
const SNAPSHOT: i32 = 185;
const REVERT: i32 = 192;
/// Of a start, of `create` and of a revert.
const PAUSED: u32 = 1;
const RESET_NVRAM: u32 = 32;
const REVERT_PAUSED: u32 = 2;

fn flagged(of: &[u8], flags: u32) -> Vec<u8> {
    [of, &flags.to_be_bytes()].concat()
}

/// What the host told of its guests so far.
fn told(events: &mut Receiver<AgentEvent>) -> Vec<RuntimeState> {
    let all = std::iter::from_fn(|| events.try_recv().ok());
    let states = all.filter_map(|event| match event {
        AgentEvent::Guest { observed } => Some(observed.state),
        _ => None,
    });
    states.collect()
}

async fn machine(server: &Server, name: &str) {
    let request = CreateInstance {
        name: Some(name.into()),
        kind: InstanceKind::VirtualMachine,
        description: String::new(),
        ephemeral: false,
        config: Config::from([("migration.stateful".into(), "true".into())]),
        devices: Default::default(),
        profiles: None,
        source: InstanceSource::None,
        start: false,
        target: None,
        vmid: None,
    };
    let admin = Context::new(Principal::system());
    let (_, operation) = server.engine.instance_create(&admin, "default", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
}

/// Not one instruction is executed before somebody says so: no host ever sees it run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_domain_that_begins_paused_executes_nothing() {
    use RuntimeState::{Paused, Stopped};
    let server = Server::start().await;
    let admin = Context::new(Principal::system());
    machine(&server, "v1").await;
    let mut seen = server.host.events().await.unwrap();
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    client.call(START_WITH_FLAGS, &flagged(&v1, PAUSED)).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 3);
    assert_eq!(told(&mut seen), [Paused]);
    let power = server.engine.instance(&admin, "default", "v1").unwrap().instance.power;
    assert_eq!(power, DesiredPower::Paused, "as after a suspend");
    client.call(RESUME, &v1).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 1);

    // Back to where it ran, and no further.
    let document = argument(|w| {
        w.string("<domainsnapshot><name>s1</name></domainsnapshot>").u32(0);
    });
    let snapshot = client.call(SNAPSHOT, &[v1.clone(), document].concat()).await.unwrap();
    told(&mut seen);
    let paused = server.host.count("guest_pause");
    client.call(REVERT, &flagged(&snapshot, REVERT_PAUSED)).await.unwrap();
    assert_eq!((told(&mut seen), client.state(&v1).await.0), (vec![Stopped, Paused], 3));
    client.call(DESTROY, &v1).await.unwrap();
    told(&mut seen);

    // A transient one.
    let config = Config::from([("size".into(), "64MiB".into())]);
    let request =
        CreateVolume { name: "d1".into(), content: VolumeContent::Block, description: String::new(), config };
    let operation = server.engine.volume_create(&admin, "default", "default", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    let xml = "<domain type='qemu'><name>t1</name><memory unit='MiB'>64</memory><os><type machine='q35'>hvm</type></os><devices>\
        <disk type='volume' device='disk'><source pool='default' volume='d1'/><target dev='vda' bus='virtio'/></disk>\
        </devices></domain>";
    let create = argument(|w| {
        w.string(xml).u32(PAUSED);
    });
    let t1 = client.call(CREATE_XML, &create).await.unwrap();
    assert_eq!((told(&mut seen), client.state(&t1).await.0), (vec![Paused], 3));
    assert_eq!(server.host.count("guest_pause"), paused, "nobody paused what ran");

    server.guest("c1", InstanceKind::Container, false).await;
    let mut lxc = server.open("full", "lxc:///system").await;
    let c1 = lxc.domain("c1").await;
    for flags in [PAUSED, RESET_NVRAM] {
        let refused = lxc.call(START_WITH_FLAGS, &flagged(&c1, flags)).await.unwrap_err();
        assert_eq!(refused.0, Code::OperationUnsupported as i32, "{refused:?}");
    }
    assert_eq!(lxc.state(&c1).await.0, 5);
}

/// What a firmware kept is gone where that is asked for, and not where it is a part of memory that was saved.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_firmware_begins_afresh_where_it_is_told_to() {
    let server = Server::start().await;
    let admin = Context::new(Principal::system());
    machine(&server, "v1").await;
    let id = server.engine.instance(&admin, "default", "v1").unwrap().instance.id;
    let fresh = || server.host.guest_spec(id).unwrap().machine.unwrap().fresh_firmware;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    client.call(START_WITH_FLAGS, &flagged(&v1, RESET_NVRAM | PAUSED)).await.unwrap();
    assert_eq!((fresh(), client.state(&v1).await.0), (true, 3));
    client.call(RESUME, &v1).await.unwrap();
    client.call(182, &flagged(&v1, 0)).await.unwrap();
    let refused = client.call(START_WITH_FLAGS, &flagged(&v1, RESET_NVRAM)).await.unwrap_err();
    assert!(
        refused.0 == Code::OperationUnsupported as i32 && refused.1.contains("--force-boot"),
        "{refused:?}"
    );
    client.call(START_WITH_FLAGS, &flagged(&v1, 0)).await.unwrap();
    assert!(!fresh(), "it is said of one start");
    client.call(DESTROY, &v1).await.unwrap();
    client.call(START_WITH_FLAGS, &flagged(&v1, RESET_NVRAM)).await.unwrap();
    assert_eq!((fresh(), client.state(&v1).await.0), (true, 1));
}

/// A machine that begins anew stays the same domain, with its number: nobody is told that it stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_begins_anew_is_the_same_domain() {
    const RESET: i32 = 245;
    const REBOOT: i32 = 27;
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let mut listener = server.open("ro", "qemu:///system").await;
    for event in [0, 1] {
        let every = argument(|w| {
            w.i32(event).u32(0);
        });
        listener.call(316, &every).await.unwrap();
    }
    let starts = server.host.count("guest_start");
    for procedure in [RESET, REBOOT] {
        client.call(procedure, &flagged(&v1, 0)).await.unwrap();
        let frame = listener.receive().await;
        assert_eq!(frame.header.procedure, 319);
        assert!(frame.payload.ends_with(&v1), "with its number");
        assert_eq!((client.domain("v1").await, client.state(&v1).await.0), (v1.clone(), 1));
    }
    // One that stands still goes on doing so.
    client.call(SUSPEND, &v1).await.unwrap();
    client.call(RESET, &flagged(&v1, 0)).await.unwrap();
    let told = [listener.receive().await, listener.receive().await];
    assert_eq!(told.map(|frame| frame.header.procedure), [318, 319]);
    assert_eq!((client.domain("v1").await, client.state(&v1).await.0), (v1.clone(), 3));
    assert_eq!((server.host.count("guest_start"), server.host.count("guest_stop")), (starts, 0));
    // And then nothing but its end.
    client.call(DESTROY, &v1).await.unwrap();
    let frame = listener.receive().await;
    assert!(frame.header.procedure == 318 && frame.payload.ends_with(&[0, 0, 0, 5, 0, 0, 0, 1]));
}

/// What becomes of a domain is told with its details, and its state says them as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn life_is_told_with_its_details() {
    const CREATE: i32 = 9;
    const MANAGED_SAVE: i32 = 182;
    const RENAME: i32 = 358;
    let server = Server::start().await;
    machine(&server, "v1").await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let mut listener = server.open("ro", "qemu:///system").await;
    let every = argument(|w| {
        w.i32(0).u32(0);
    });
    listener.call(316, &every).await.unwrap();
    let mut demand = async |name: &str, all: &[(i32, i32)]| {
        for told in all {
            let frame = listener.receive().await;
            assert_eq!(frame.header.procedure, 318);
            let mut r = Reader::new(&frame.payload);
            r.i32().unwrap();
            let of = r.string().unwrap();
            r.uuid().unwrap();
            r.i32().unwrap();
            assert_eq!((of.as_str(), (r.i32().unwrap(), r.i32().unwrap())), (name, *told));
        }
    };
    let document = argument(|w| {
        w.string("<domainsnapshot><name>s1</name></domainsnapshot>").u32(0);
    });
    client.call(CREATE, &v1).await.unwrap();
    demand("v1", &[(2, 0)]).await;
    assert_eq!(client.state(&v1).await, (1, 1));
    client.call(MANAGED_SAVE, &flagged(&v1, 0)).await.unwrap();
    demand("v1", &[(5, 4)]).await;
    assert_eq!(client.state(&v1).await, (5, 5));
    client.call(CREATE, &v1).await.unwrap();
    demand("v1", &[(2, 1)]).await;
    assert_eq!(client.state(&v1).await, (1, 3));
    client.call(SUSPEND, &v1).await.unwrap();
    client.call(RESUME, &v1).await.unwrap();
    demand("v1", &[(3, 0), (4, 0)]).await;
    assert_eq!(client.state(&v1).await, (1, 5));
    let snapshot = client.call(SNAPSHOT, &[v1.clone(), document].concat()).await.unwrap();
    client.call(REVERT, &flagged(&snapshot, 0)).await.unwrap();
    demand("v1", &[(5, 6), (0, 3), (2, 3)]).await;
    assert_eq!(client.state(&v1).await, (1, 4));
    client.call(DESTROY, &v1).await.unwrap();
    demand("v1", &[(5, 1)]).await;
    let new = argument(|w| {
        w.optional(Some("v2")).u32(0);
    });
    client.call(RENAME, &[v1, new].concat()).await.unwrap();
    demand("v1", &[(1, 1)]).await;
    demand("v2", &[(0, 2)]).await;
}

/// A way to ask is taken at its word, and memory and addresses are those that were asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_for_is_told() {
    const MEMORY: i32 = 159;
    const PERIOD: i32 = 308;
    const ADDRESSES: i32 = 353;
    const SHUTDOWN_FLAGS: i32 = 258;
    const AGENT: u32 = 2;
    let server = Server::start().await;
    let admin = Context::new(Principal::system());
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let told = async |client: &mut crate::support::Client| {
        let asked = argument(|w| {
            w.u32(32).u32(0);
        });
        let answer = client.call(MEMORY, &[v1.clone(), asked].concat()).await.unwrap();
        let mut r = Reader::new(&answer);
        let all = r.array(32, |r| Ok((r.i32()?, r.u64()?))).unwrap();
        all.into_iter().collect::<std::collections::BTreeMap<_, _>>()
    };
    let all = told(&mut client).await;
    let gib = 1 << 20;
    assert_eq!((all[&6], all[&5], all[&4], all[&8], all[&10]), (gib, gib, gib / 2, gib / 4 * 3, gib / 4));
    assert_eq!((all[&0], all[&1], all[&2], all[&3]), (0, 4, 7, 700));
    assert!(all[&9] > 0 && all.contains_key(&7) && !all.contains_key(&11));
    let period = |seconds: i32, flags: u32| {
        let asked = argument(|w| {
            w.i32(seconds).u32(flags);
        });
        [v1.clone(), asked].concat()
    };
    for (seconds, flags, code) in
        [(-1, 1, Code::InvalidArg), (1 << 30, 2, Code::InvalidArg), (1 << 30, 1, Code::InvalidArg)]
    {
        let refused = client.call(PERIOD, &period(seconds, flags)).await.unwrap_err();
        assert_eq!(refused.0, code as i32, "{refused:?}");
    }
    // Of the next start, which leaves what runs.
    client.call(PERIOD, &period(7, 2)).await.unwrap();
    let defined = server.engine.instance(&admin, "default", "v1").unwrap().instance.config.clone();
    assert_eq!(defined.get("hardware.balloon.period").map(String::as_str), Some("7"));
    assert!(crate::define::dump(&mut client, "v1", 2).await.contains("<stats period='7'/>"));
    assert!(!crate::define::dump(&mut client, "v1", 0).await.contains("<stats "));
    client.call(PERIOD, &period(0, 1)).await.unwrap();
    assert_eq!(told(&mut client).await.into_keys().collect::<Vec<_>>(), [6, 7]);

    // One with an address that no server gave is found where the host's kernel is asked.
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mac = view.instance.identities.values().find_map(|i| i.mac.clone()).expect("it has a NIC");
    server.host.speaks(&mac, "192.0.2.77".parse().unwrap());
    server.host.speaks("02:00:00:00:00:09", "192.0.2.78".parse().unwrap());
    let mut found = vec![];
    for source in [0, 2] {
        let asked = argument(|w| {
            w.u32(source).u32(0);
        });
        let answer = client.call(ADDRESSES, &[v1.clone(), asked].concat()).await.unwrap();
        let has = |address: &str| answer.windows(address.len()).any(|part| part == address.as_bytes());
        found.push((has("192.0.2.77"), has("192.0.2.78")));
    }
    assert_eq!(found, [(false, false), (true, false)]);

    // The agent alone is the agent alone.
    server.host.inject("guest_ask", Fault::FailBefore(Error::unavailable("the guest agent does not answer")));
    let refused = client.call(SHUTDOWN_FLAGS, &flagged(&v1, AGENT)).await.unwrap_err();
    assert_eq!(refused.0, Code::AgentUnresponsive as i32, "{refused:?}");
    assert_eq!(client.state(&v1).await.0, 1);
}

/// A domain that is defined is started by its own document, stays defined, and starts as nothing else; and one may end with the
/// connection that it was started over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_starts_what_it_defines() {
    const DUMP: i32 = 14;
    const AUTODESTROY: u32 = 2;
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let document = client.call(DUMP, &flagged(&v1, 2)).await.unwrap();
    let document = Reader::new(&document).string().unwrap();
    let create = |document: &str| {
        argument(|w| {
            w.string(document).u32(0);
        })
    };
    let revision = server.settled().await;
    let other = document.replacen("<devices>", "<on_crash>restart</on_crash><devices>", 1);
    let other = other.replacen("<on_crash>destroy</on_crash>", "", 1);
    let refused = client.call(CREATE_XML, &create(&other)).await.unwrap_err();
    assert!(refused.0 == Code::ConfigUnsupported as i32 && refused.1.contains("definition"), "{refused:?}");
    assert_eq!(server.engine.inner().inventory.read().revision, revision);
    client.call(CREATE_XML, &create(&document)).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 1);
    let refused = client.call(CREATE_XML, &create(&document)).await.unwrap_err();
    assert!(
        refused.0 == Code::OperationInvalid as i32 && refused.1.contains("already active"),
        "{refused:?}"
    );
    client.call(DESTROY, &v1).await.unwrap();
    assert_eq!(client.state(&v1).await, (5, 2), "it is defined");

    // One goes with its connection; what was started anew since does not.
    server.guest("v2", InstanceKind::VirtualMachine, false).await;
    let v2 = client.domain("v2").await;
    let mut passing = server.open("full", "qemu:///system").await;
    for domain in [&v1, &v2] {
        passing.call(START_WITH_FLAGS, &flagged(domain, AUTODESTROY)).await.unwrap();
    }
    client.call(DESTROY, &v2).await.unwrap();
    client.call(START_WITH_FLAGS, &flagged(&v2, 0)).await.unwrap();
    drop(passing);
    let end = std::time::Instant::now() + crate::support::PATIENCE;
    while client.state(&v1).await != (5, 2) {
        assert!(std::time::Instant::now() < end, "it ends with its connection");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(client.state(&v2).await.0, 1);
}

/// One that a full disk halted is paused to libvirt, by an error of IO: it is resumed or destroyed, and not started.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_domain_that_a_full_disk_halted_is_paused() {
    let server = Server::start().await;
    let admin = Context::new(Principal::system());
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let id = server.engine.instance(&admin, "default", "v1").unwrap().instance.id;
    let status = || server.engine.instance(&admin, "default", "v1").unwrap().status;
    let until = async |wanted: Status| {
        let end = std::time::Instant::now() + PATIENCE;
        while status() != wanted {
            assert!(std::time::Instant::now() < end, "{:?}, not {wanted:?}", status());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    for (why, reason) in [
        (HaltReason::Disk { slot: None, full: true }, 5),
        (HaltReason::Watchdog, 6),
        (HaltReason::Panicked, 10),
    ] {
        let pid = server.host.pid_of(id);
        assert!(server.host.halt_guest(id, why));
        until(Status::Error).await;
        assert_eq!(client.state(&v1).await, (3, reason));
        let (code, _) = client.call(START_WITH_FLAGS, &flagged(&v1, 0)).await.unwrap_err();
        assert_eq!(code, Code::OperationInvalid as i32);
        // What it says of itself is a line of `virsh dominfo`.
        let said = client.call(426, &flagged(&v1, 0)).await.unwrap();
        let said = Reader::new(&said).array(10, |r| r.string()).unwrap();
        assert_eq!(said.len(), 1, "{said:?}");
        client.call(SUSPEND, &v1).await.unwrap();
        assert_eq!(client.state(&v1).await, (3, reason), "it stands still already");
        client.call(RESUME, &v1).await.unwrap();
        assert_eq!(client.state(&v1).await.0, 1);
        assert_eq!(server.host.pid_of(id), pid, "the same process");
    }
    assert!(server.host.halt_guest(id, HaltReason::Internal));
    until(Status::Error).await;
    client.call(DESTROY, &v1).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 5);
}
