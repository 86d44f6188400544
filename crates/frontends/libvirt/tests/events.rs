//! Events of objects that are gone, or whose names others have, by the time somebody looks at them.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{PATIENCE, Server, argument};
use karst_agent::resources::UsbResources;
use karst_engine::{
    Context,
    events::{EventKind, Subject},
    secrets::DefineSecret,
    storage::CreatePool,
};
use karst_frontend_libvirt::{
    error::Code,
    frame::Kind,
    xdr::{Reader, Typed},
};
use karst_model::{
    access::Principal,
    display::DisplayProtocol,
    guest::ExecRequest,
    instance::InstanceKind,
    news::{DiskErrorAction, Happened, MemoryFailureAction, WatchdogAction},
    secret::SecretUse,
};
use uuid::Uuid;

const NETWORK: &str = "3a1b0e4c-5d0d-4a0f-9d5d-0f3f6f2b1c33";

fn of(subject: &Subject) -> Uuid {
    match subject {
        Subject::Instance(i, _) => i.id.uuid(),
        Subject::Network(n) => n.id.uuid(),
        Subject::Pool(p) => p.id.uuid(),
        Subject::Secret(s) => s.uuid,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_have_their_objects_when_those_are_gone() {
    let server = Server::start().await;
    let admin = Context::new(Principal::system());
    // Nobody reads what either hears before all is over.
    let mut heard = server.engine.subscribe(&admin).unwrap();
    let mut listener = server.open("ro", "qemu:///system").await;
    // Networks' and domains' lifecycle.
    for procedure in [313, 316] {
        listener
            .call(
                procedure,
                &argument(|w| {
                    w.i32(0).u32(0);
                }),
            )
            .await
            .unwrap();
    }
    let mut client = server.open("full", "qemu:///system").await;
    let xml = format!("<network><name>n1</name><uuid>{NETWORK}</uuid><forward mode='nat'/></network>");
    let network = client
        .call(
            432,
            &argument(|w| {
                w.string(&xml).u32(0);
            }),
        )
        .await
        .unwrap();
    for procedure in [39, 42, 49] {
        client.call(procedure, &network).await.unwrap();
    }
    // Two of one name.
    let mut machines = vec![];
    for _ in 0..2 {
        server.guest("v1", InstanceKind::VirtualMachine, false).await;
        let view = server.engine.instance(&admin, "default", "v1").unwrap();
        machines.push((view.instance.id.uuid(), karst_frontend_libvirt::domain_uuid(&view)));
        let gone = server.engine.instance_delete(&admin, "default", "v1").await.unwrap();
        assert_eq!(gone.ended().await.error, None);
    }
    let new = DefineSecret {
        uuid: None,
        description: String::new(),
        kind: SecretUse::Volume,
        usage: "/v".into(),
        private: true,
        ephemeral: false,
    };
    let secret = server.engine.secret_define(&admin, "default", new).await.unwrap();
    server.engine.secret_undefine(&admin, "default", secret.uuid).await.unwrap();
    let request = CreatePool { name: "p2".into(), driver: "dir".into(), ..Default::default() };
    let made = server.engine.pool_create(&admin, request).await.unwrap();
    assert_eq!(made.ended().await.error, None);
    let pool = server.engine.pool(&admin, "p2").unwrap().id.uuid();
    let gone = server.engine.pool_delete(&admin, "p2").await.unwrap();
    assert_eq!(gone.ended().await.error, None);

    let mut told = vec![];
    while told.last().is_none_or(|(action, _)| *action != "storage-pool-deleted") {
        let event = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
        let EventKind::Lifecycle { action, .. } = &event.kind else { continue };
        let kind = action.split_once('-').map_or("", |(kind, _)| kind);
        if matches!(kind, "instance" | "network" | "secret" | "storage") {
            told.push((*action, of(event.subject.as_ref().expect("an object"))));
        }
    }
    let network = told[0].1;
    let [(first, first_uuid), (second, second_uuid)] = machines[..] else { panic!("{machines:?}") };
    assert_eq!(
        told,
        [
            ("network-created", network),
            ("network-started", network),
            ("network-stopped", network),
            ("network-deleted", network),
            ("instance-created", first),
            ("instance-deleted", first),
            ("instance-created", second),
            ("instance-deleted", second),
            ("secret-created", secret.uuid),
            ("secret-deleted", secret.uuid),
            ("storage-pool-created", pool),
            ("storage-pool-deleted", pool),
        ]
    );
    // What a client of libvirt hears: UUIDs that its documents had.
    let mut domains = vec![];
    let mut networks = vec![];
    while domains.len() < 4 || networks.len() < 4 {
        let frame = listener.receive().await;
        assert_eq!(frame.header.kind, Kind::Message);
        let mut r = Reader::new(&frame.payload);
        r.i32().unwrap();
        let (name, uuid) = (r.string().unwrap(), r.uuid().unwrap());
        match frame.header.procedure {
            315 => networks.push((name, uuid, r.i32().unwrap())),
            318 => {
                r.i32().unwrap();
                domains.push((name, uuid, r.i32().unwrap()));
            }
            other => panic!("event {other}"),
        }
    }
    let uuid: Uuid = NETWORK.parse().unwrap();
    assert_eq!(networks, [0, 2, 3, 1].map(|change| ("n1".to_owned(), uuid, change)));
    let of = [(first_uuid, 0), (first_uuid, 1), (second_uuid, 0), (second_uuid, 1)];
    assert_eq!(domains, of.map(|(uuid, change)| ("v1".to_owned(), uuid, change)));
}

/// Lets a simulated machine write all over its disks, as a program in it does.
async fn write(server: &Server) {
    let request = ExecRequest {
        command: vec!["true".into()],
        environment: Default::default(),
        uid: 0,
        gid: 0,
        cwd: None,
        terminal: None,
        term: None,
    };
    server.engine.exec(&Context::new(Principal::system()), "default", "v1", request).await.map(drop).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thresholds_of_disks_are_told_once() {
    const SET: i32 = 386;
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let mut listener = server.open("ro", "qemu:///system").await;
    let threshold_events = argument(|w| {
        w.i32(24).u32(0);
    });
    listener.call(316, &threshold_events).await.unwrap();
    let to = |domain: &[u8], disk: &str, bytes: u64, flags: u32| {
        let said = argument(|w| {
            w.string(disk).u64(bytes).u32(flags);
        });
        [domain, &said].concat()
    };
    let invalid = Code::InvalidArg as i32;
    for (disk, bytes, flags, word) in
        [("vdz", 1, 0, "vdz"), ("sda", 1, 1, "flags"), ("sda", u64::MAX, 0, "threshold")]
    {
        let refused = client.call(SET, &to(&v1, disk, bytes, flags)).await.unwrap_err();
        assert!(refused.0 == invalid && refused.1.contains(word), "{disk} {bytes} {flags}: {refused:?}");
    }
    server.guest("off", InstanceKind::VirtualMachine, false).await;
    let off = client.domain("off").await;
    let refused = client.call(SET, &to(&off, "sda", 1, 0)).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationInvalid as i32, "{refused:?}");
    let refused = listener.call(SET, &to(&v1, "sda", 1, 0)).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationDenied as i32, "{refused:?}");
    server.guest("c1", InstanceKind::Container, true).await;
    let mut lxc = server.open("full", "lxc:///system").await;
    let c1 = lxc.domain("c1").await;
    let refused = lxc.call(SET, &to(&c1, "sda", 1, 0)).await.unwrap_err();
    assert_eq!(refused.0, Code::NoSupport as i32, "{refused:?}");

    // The first is reached, and is none any more; the second is taken away; the third is reached.
    client.call(SET, &to(&v1, "sda", 1 << 20, 0)).await.unwrap();
    write(&server).await;
    write(&server).await;
    client.call(SET, &to(&v1, "sda", 3 << 20, 0)).await.unwrap();
    client.call(SET, &to(&v1, "sda", 0, 0)).await.unwrap();
    write(&server).await;
    client.call(SET, &to(&v1, "/karst/default/instances/v1", 2 << 20, 0)).await.unwrap();
    write(&server).await;
    for bytes in [1 << 20, 2 << 20] {
        let frame = listener.receive().await;
        assert_eq!((frame.header.kind, frame.header.procedure), (Kind::Message, 385));
        let mut r = Reader::new(&frame.payload);
        r.i32().unwrap();
        assert_eq!(r.string().unwrap(), "v1");
        r.uuid().unwrap();
        assert!(r.i32().unwrap() > 0, "it runs");
        assert_eq!(r.string().unwrap(), "sda");
        assert_eq!(r.option(|r| r.string()).unwrap().as_deref(), Some("/karst/default/instances/v1"));
        assert_eq!(r.u64().unwrap(), bytes);
        assert!(r.u64().unwrap() > 0, "how far behind it");
        r.end().unwrap();
    }
}

/// Each kind once, with its whole message: listeners of libvirt's clients decode them as libvirtd's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_in_machines_is_told_in_libvirts_words() {
    const SET_METADATA: i32 = 264;
    const PIN_VCPU: i32 = 225;
    let server = Server::start().await;
    let admin = Context::new(Principal::system());
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    server.guest("c1", InstanceKind::Container, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let mut listener = server.open("ro", "qemu:///system").await;
    let mut numbers = vec![];
    for event in 0..27 {
        let every = argument(|w| {
            w.i32(event).u32(0);
        });
        numbers.push(listener.call(316, &every).await.unwrap());
    }
    // Of another kind of guests, to whom none of this is told.
    let mut other = server.open("ro", "lxc:///system").await;
    let c1 = other.domain("c1").await;
    let reboots = argument(|w| {
        w.i32(1).u32(0);
    });
    other.call(316, &reboots).await.unwrap();
    // As old clients do: without a number.
    let mut plain = server.open("ro", "qemu:///system").await;
    for event in [3, 10, 18] {
        plain
            .call(
                167,
                &argument(|w| {
                    w.i32(event);
                }),
            )
            .await
            .unwrap();
    }
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let id = view.instance.id;
    let root = view.instance.identities.values().find(|i| i.slot == "scsi0").expect("its root");
    let (slot, alias) = (root.slot.clone(), root.alias.clone());
    let path = "/karst/default/instances/v1";
    let lifecycle = |kind: i32, detail: i32| {
        (
            0,
            318,
            None,
            argument(|w| {
                w.i32(kind).i32(detail);
            }),
        )
    };
    let numbers_only = |all: &[i32]| {
        argument(|w| {
            for n in all {
                w.i32(*n);
            }
        })
    };
    let of_device = || {
        argument(|w| {
            w.string(&alias);
        })
    };
    let io_error = |reason: Option<&str>, action: i32| {
        argument(|w| {
            w.string(path).string(&alias).i32(action);
            if let Some(reason) = reason {
                w.string(reason);
            }
        })
    };
    type Message = (usize, i32, Option<i32>, Vec<u8>);
    let cases: Vec<(Happened, Vec<Message>)> = vec![
        (Happened::Reset, vec![(1, 319, None, vec![])]),
        (
            Happened::Clock { offset: -7 },
            vec![(
                2,
                320,
                None,
                argument(|w| {
                    w.i64(-7);
                }),
            )],
        ),
        (
            Happened::Watchdog { action: WatchdogAction::Pause },
            vec![(3, 321, None, numbers_only(&[1])), lifecycle(3, 3)],
        ),
        (
            Happened::DiskError { slot: slot.clone(), action: DiskErrorAction::Halted, full: true },
            vec![
                (4, 322, None, io_error(None, 1)),
                (6, 324, None, io_error(Some("enospc"), 1)),
                lifecycle(3, 2),
            ],
        ),
        (
            Happened::DiskError { slot: slot.clone(), action: DiskErrorAction::Reported, full: false },
            vec![(4, 322, None, io_error(None, 2)), (6, 324, None, io_error(Some(""), 2))],
        ),
        (Happened::Recovered, vec![lifecycle(4, 0)]),
        (
            Happened::Tray { slot: slot.clone(), open: true },
            vec![(10, 328, None, [of_device(), numbers_only(&[0])].concat())],
        ),
        (Happened::Asleep { disk: false }, vec![(12, 330, Some(0), vec![]), lifecycle(7, 0)]),
        (Happened::Awake, vec![(11, 329, Some(0), vec![]), lifecycle(2, 4)]),
        (Happened::Asleep { disk: true }, vec![(14, 332, Some(0), vec![]), lifecycle(7, 1)]),
        (
            Happened::Balloon { actual: (1 << 20) + 1 },
            vec![(
                13,
                331,
                None,
                argument(|w| {
                    w.u64(1025);
                }),
            )],
        ),
        (Happened::DeviceRemoved { slot: slot.clone() }, vec![(15, 333, None, of_device())]),
        (Happened::DeviceAdded { slot: slot.clone() }, vec![(19, 354, None, of_device())]),
        (Happened::DeviceKept { slot: slot.clone() }, vec![(22, 367, None, of_device())]),
        (Happened::Agent { connected: true }, vec![(18, 348, None, numbers_only(&[1, 2]))]),
        (Happened::Agent { connected: false }, vec![(18, 348, None, numbers_only(&[2, 2]))]),
        (
            Happened::MemoryFailure {
                guest: true,
                action: MemoryFailureAction::Injected,
                required: true,
                recursive: false,
            },
            vec![(25, 423, None, numbers_only(&[1, 1, 1]))],
        ),
        (Happened::ShutDown, vec![lifecycle(6, 1)]),
    ];
    let mut demand = async |what: &str, all: &[Message]| {
        for (event, procedure, lead, body) in all {
            let frame = listener.receive().await;
            assert_eq!((frame.header.kind, frame.header.procedure), (Kind::Message, *procedure), "{what}");
            let lead = lead.map(|n: i32| n.to_be_bytes().to_vec()).unwrap_or_default();
            assert_eq!(
                frame.payload.to_vec(),
                [&numbers[*event], &lead, &v1, body].map(|b| b.as_slice()).concat(),
                "{what}"
            );
        }
    };
    for (what, all) in cases {
        server.host.happens(id, what.clone());
        demand(&format!("{what:?}"), &all).await;
    }
    // Those that were there when clients had no numbers for their callbacks; the agent's were not.
    for procedure in [171, 268] {
        let frame = plain.receive().await;
        assert_eq!((frame.header.procedure, frame.payload.starts_with(&v1)), (procedure, true));
    }

    // Somebody looks at the screen, who need not know a password.
    let viewer =
        server.engine.machine_display(&admin, "default", "v1", DisplayProtocol::Vnc, true).await.unwrap();
    drop(viewer);
    let nowhere = argument(|w| {
        w.i32(2).string("").string("");
    });
    let seen = |phase: i32| {
        let who = argument(|w| {
            w.string("none").u32(1).string("karst").string("karst");
        });
        (5, 323, None, [&numbers_only(&[phase]), &nowhere, &nowhere, &who].map(|b| b.as_slice()).concat())
    };
    demand("a viewer", &[seen(0), seen(1), seen(2)]).await;

    // An application says something of the domain, and takes it back.
    for value in [Some("<a xmlns='http://x.org/1'/>"), None] {
        let said = argument(|w| {
            w.i32(2).optional(value).optional(Some("k")).optional(Some("http://x.org/1")).u32(0);
        });
        client.call(SET_METADATA, &[v1.clone(), said].concat()).await.unwrap();
        let (mut told, mut defined) = (0, 0);
        while (told, defined) != (1, 1) {
            let frame = listener.receive().await;
            match frame.header.procedure {
                379 => {
                    let about = argument(|w| {
                        w.i32(2).optional(Some("http://x.org/1"));
                    });
                    let whole = [&numbers[23], &v1, &about].map(|b| b.as_slice()).concat();
                    assert_eq!(frame.payload.to_vec(), whole);
                    told += 1;
                }
                318 => defined += 1,
                other => panic!("event {other}"),
            }
        }
    }

    // What is defined is tuned, of which nothing is told, and what runs.
    for (map, flags) in [([4u8, 0], 2), ([2, 0], 1)] {
        let pin = argument(|w| {
            w.u32(0).opaque(&map).u32(flags);
        });
        client.call(PIN_VCPU, &[v1.clone(), pin].concat()).await.unwrap();
    }
    loop {
        let frame = listener.receive().await;
        match frame.header.procedure {
            346 => {
                let parameters = argument(|w| {
                    w.u32(1).typed("cputune.vcpupin0", &Typed::Text("1".into()));
                });
                let whole = [&numbers[17], &v1, &parameters].map(|b| b.as_slice()).concat();
                assert_eq!(frame.payload.to_vec(), whole);
                break;
            }
            318 => {}
            other => panic!("event {other}"),
        }
    }

    let container = server.engine.instance(&admin, "default", "c1").unwrap().instance.id;
    server.host.happens(container, Happened::Reset);
    let frame = other.receive().await;
    assert!(frame.header.procedure == 319 && frame.payload.ends_with(&c1), "nothing before its own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_of_the_host_come_and_go() {
    const REGISTER: i32 = 374;
    const DEREGISTER: i32 = 375;
    let server = Server::start().await;
    let mut listener = server.open("ro", "qemu:///system").await;
    let of = |event: i32, only: Option<&str>| {
        argument(|w| {
            w.i32(event).optional(only);
        })
    };
    let refused = listener.call(REGISTER, &of(2, None)).await.unwrap_err();
    assert_eq!(refused.0, Code::InvalidArg as i32, "{refused:?}");
    let refused = listener.call(REGISTER, &of(0, Some("usb_9_9"))).await.unwrap_err();
    assert_eq!(refused.0, Code::NoNodeDevice as i32, "{refused:?}");
    let every = listener.call(REGISTER, &of(0, None)).await.unwrap();
    // Nothing happens to this one, and nothing of this kind.
    listener.call(REGISTER, &of(0, Some("net_eth0"))).await.unwrap();
    let updates = listener.call(REGISTER, &of(1, None)).await.unwrap();
    let device = |product: &str| UsbResources {
        bus: 7,
        device: 3,
        vendor_id: "1d6b".into(),
        product_id: "0003".into(),
        product: product.into(),
        ..UsbResources::default()
    };
    let next = async |listener: &mut crate::support::Client| {
        let frame = listener.receive().await;
        assert_eq!(frame.header.kind, Kind::Message);
        let mut r = Reader::new(&frame.payload);
        let (number, name) = (r.i32().unwrap(), r.string().unwrap());
        let change = (frame.header.procedure == 376).then(|| {
            let change = r.i32().unwrap();
            assert_eq!(r.i32().unwrap(), 0, "no detail");
            change
        });
        r.end().unwrap();
        (number.to_be_bytes().to_vec(), name, change)
    };
    let name = "usb_7_3".to_owned();
    server.host.plug(vec![device("one")]);
    assert_eq!(next(&mut listener).await, (every.clone(), name.clone(), Some(0)));
    server.host.plug(vec![]);
    assert_eq!(next(&mut listener).await, (every.clone(), name.clone(), Some(1)));
    server.host.plug(vec![device("one")]);
    assert_eq!(next(&mut listener).await, (every.clone(), name.clone(), Some(0)));
    server.host.plug(vec![device("two")]);
    assert_eq!(next(&mut listener).await, (updates.clone(), name, None));
    listener.call(DEREGISTER, &every).await.unwrap();
    let refused = listener.call(DEREGISTER, &every).await.unwrap_err();
    assert_eq!(refused.0, Code::InvalidArg as i32, "{refused:?}");
}

/// The host is looked at once for all who listen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_listen_for_devices_are_one_look() {
    let server = Server::start().await;
    let mut listeners = vec![];
    for _ in 0..8 {
        let mut listener = server.open("ro", "qemu:///system").await;
        let every = argument(|w| {
            w.i32(0).optional(None);
        });
        listener.call(374, &every).await.unwrap();
        listeners.push(listener);
    }
    let before = server.host.count("host_resources");
    for plugged in [vec![UsbResources { bus: 7, device: 3, ..UsbResources::default() }], vec![]] {
        server.host.plug(plugged);
        for listener in &mut listeners {
            assert_eq!(listener.receive().await.header.procedure, 376);
        }
    }
    let looks = server.host.count("host_resources") - before;
    assert!((2..8).contains(&looks), "{looks} looks for two changes");
}
