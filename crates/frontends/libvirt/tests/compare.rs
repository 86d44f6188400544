//! What is asked of the host beyond its hardware: processors compared, kinds of pools, what becomes of pools, and what
//! becomes of guests that crash.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    host::{arguments, ask, number, string},
    support::{Client, Server},
};
use karst_engine::{Context, storage::CreatePool};
use karst_frontend_libvirt::{error::Code, frame::Kind, xdr::Reader, xml::read::document};
use karst_model::{access::Principal, instance::InstanceKind};

async fn compared(client: &mut Client, procedure: &str, xml: &str, flags: u32) -> Result<i32, i32> {
    let answer = ask(client, procedure, |w| {
        if procedure.contains("HYPERVISOR") {
            w.u32(0).u32(0).u32(0).u32(0);
        }
        w.string(xml).u32(flags)
    });
    answer.await.map(|payload| Reader::new(&payload).i32().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processors_are_compared_with_the_hosts_and_with_what_guests_get() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let capabilities = string(&ask(&mut client, "CONNECT_GET_CAPABILITIES", |w| w).await.unwrap());
    let root = document(&capabilities).unwrap();
    let own = root.find("host").unwrap().find("cpu").unwrap();
    assert_eq!(own.find("model").unwrap().body(), "Nehalem");
    let own = own.document();
    let more = "<cpu><model>Nehalem</model><feature name='svm'/></cpu>";
    for procedure in ["CONNECT_COMPARE_CPU", "CONNECT_COMPARE_HYPERVISOR_CPU"] {
        let mut compared = async |xml: &str, flags| compared(&mut client, procedure, xml, flags).await;
        assert_eq!(compared(&own, 0).await, Ok(1), "{procedure}: identical");
        assert_eq!(compared("<cpu><model>Nehalem</model></cpu>", 0).await, Ok(2), "superset");
        assert_eq!(compared(more, 0).await, Ok(0), "incompatible");
        assert_eq!(compared(more, 1).await, Err(Code::CpuIncompatible as i32));
        assert_eq!(compared("<cpu><model>Nehalem</mod", 0).await, Err(Code::XmlError as i32));
        assert_eq!(compared("<domain/>", 0).await, Err(Code::XmlError as i32));
        assert_eq!(compared("<cpu><model>X</model></cpu>", 0).await, Err(Code::InternalError as i32));
        assert_eq!(compared(&own, 4).await, Err(Code::InvalidArg as i32), "an unknown flag");
    }
    let foreign = ask(&mut client, "CONNECT_COMPARE_HYPERVISOR_CPU", |w| {
        w.u32(0).optional(Some("aarch64")).u32(0).u32(0).string(&own).u32(0)
    });
    assert_eq!(foreign.await, Err(Code::ConfigUnsupported as i32));
    let cpus = [own.as_str(), "<cpu><model>Haswell</model></cpu>"];
    let write = |w: &mut karst_frontend_libvirt::xdr::Writer| {
        w.array(cpus, |w, c| {
            w.string(c);
        })
        .u32(0);
    };
    let common = ask(&mut client, "CONNECT_BASELINE_CPU", |w| {
        write(w);
        w
    });
    let common = string(&common.await.unwrap());
    assert!(common.contains("<model fallback='allow'>Nehalem</model>"), "{common}");
    assert!(common.contains("<feature policy='require' name='aes'/>"), "{common}");
    let common = ask(&mut client, "CONNECT_BASELINE_HYPERVISOR_CPU", |w| {
        w.u32(0).u32(0).u32(0).u32(0);
        write(w);
        w
    });
    let common = string(&common.await.unwrap());
    assert_eq!(compared(&mut client, "CONNECT_COMPARE_HYPERVISOR_CPU", &common, 0).await, Ok(2));
    let none = ask(&mut client, "CONNECT_BASELINE_CPU", |w| w.u32(0).u32(0)).await;
    assert_eq!(none, Err(Code::InvalidArg as i32));
    let models = ask(&mut client, "CONNECT_GET_CPU_MODEL_NAMES", |w| w.string("x86_64").i32(1).u32(0)).await;
    let models = Reader::new(&models.unwrap()).array(100, |r| r.string()).unwrap();
    assert!(models.contains(&"Haswell".to_owned()) && !models.contains(&"max".to_owned()), "{models:?}");
    let can =
        ask(&mut client, "CONNECT_GET_DOMAIN_CAPABILITIES", |w| w.u32(0).u32(0).u32(0).u32(0).u32(0)).await;
    let can = string(&can.unwrap());
    assert!(can.contains("<model usable='no' vendor='Intel'>Haswell</model>"), "{can}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_tell_their_kinds_and_what_becomes_of_them() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let kinds =
        string(&ask(&mut client, "CONNECT_GET_STORAGE_POOL_CAPABILITIES", |w| w.u32(0)).await.unwrap());
    let root = document(&kinds).unwrap();
    let supported: Vec<_> = root
        .all("pool")
        .filter(|p| p.attribute("supported") == Some("yes"))
        .filter_map(|p| p.attribute("type"))
        .collect();
    assert!(supported.contains(&"dir") && !supported.contains(&"iscsi"), "{supported:?}");
    for (kind, code) in [("dir", Code::NoSupport), ("nonsense", Code::InternalError)] {
        let found =
            ask(&mut client, "CONNECT_FIND_STORAGE_POOL_SOURCES", |w| w.string(kind).u32(0).u32(0)).await;
        assert_eq!(found, Err(code as i32), "{kind}");
    }
    let mut listener = server.open("ro", "qemu:///system").await;
    let register = "CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY";
    let lifecycle = ask(&mut listener, register, |w| w.i32(0).u32(0)).await.unwrap();
    let refresh = ask(&mut listener, register, |w| w.i32(1).u32(0)).await.unwrap();
    assert_eq!(ask(&mut listener, register, |w| w.i32(2).u32(0)).await, Err(Code::InvalidArg as i32));
    let admin = Context::new(Principal::system());
    let request = CreatePool { name: "p2".into(), driver: "dir".into(), ..Default::default() };
    let made = server.engine.pool_create(&admin, request).await.unwrap();
    assert_eq!(made.ended().await.error, None);
    let pool = ask(&mut client, "STORAGE_POOL_LOOKUP_BY_NAME", |w| w.string("p2")).await.unwrap();
    client.call(number("STORAGE_POOL_REFRESH"), &[&pool[..], &[0; 4]].concat()).await.unwrap();
    let (mut happened, mut refreshed) = (vec![], 0);
    let mut hears = async |many: usize| {
        while happened.len() < many || refreshed < 1 {
            let frame = listener.receive().await;
            assert_eq!(frame.header.kind, Kind::Message);
            match frame.header.procedure {
                370 => {
                    assert!(frame.payload.starts_with(&[&lifecycle[..], &pool[..]].concat()));
                    let rest = &frame.payload[lifecycle.len() + pool.len()..];
                    happened.push(Reader::new(rest).i32().unwrap());
                }
                373 => {
                    assert_eq!(frame.payload, [&refresh[..], &pool[..]].concat());
                    refreshed += 1;
                }
                other => panic!("event {other}"),
            }
        }
    };
    hears(3).await;
    let gone = server.engine.pool_delete(&admin, "p2").await.unwrap();
    assert_eq!(gone.ended().await.error, None);
    hears(6).await;
    assert_eq!(happened, [0, 4, 2, 3, 5, 1]);
    let deregister = number("CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY");
    listener.call(deregister, &lifecycle).await.unwrap();
    assert_eq!(listener.call(deregister, &lifecycle).await.unwrap_err().0, Code::InvalidArg as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashes_and_agents_that_are_waited_for() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let action = async |client: &mut Client, kind: u32, action: u32| {
        let rest = arguments(|w| w.u32(kind).u32(action).u32(0));
        client.call(number("DOMAIN_SET_LIFECYCLE_ACTION"), &[&v1[..], &rest].concat()).await.map_err(|e| e.0)
    };
    let xml = async |client: &mut Client| {
        string(&client.call(number("DOMAIN_GET_XML_DESC"), &[&v1[..], &[0; 4]].concat()).await.unwrap())
    };
    // Off is off; what follows a reboot and a crash is the administrator's choice.
    for (kind, wanted) in [(0, 0), (1, 1), (2, 1)] {
        assert!(action(&mut client, kind, wanted).await.is_ok(), "{kind}");
    }
    assert!(xml(&mut client).await.contains("<on_crash>restart</on_crash>"));
    let admin = Context::new(Principal::system());
    let now = |key: &str| {
        server.engine.instance(&admin, "default", "v1").unwrap().instance.config.get(key).cloned()
    };
    assert_eq!(now("boot.autorestart").as_deref(), Some("true"));
    assert!(action(&mut client, 2, 0).await.is_ok());
    assert!(xml(&mut client).await.contains("<on_crash>destroy</on_crash>"));
    assert!(action(&mut client, 1, 0).await.is_ok());
    assert!(xml(&mut client).await.contains("<on_reboot>destroy</on_reboot>"));
    assert_eq!(now("boot.reboot_action").as_deref(), Some("stop"));
    assert!(action(&mut client, 1, 1).await.is_ok());
    assert!(xml(&mut client).await.contains("<on_reboot>restart</on_reboot>"));
    // To be looked at; and back.
    assert!(action(&mut client, 2, 3).await.is_ok());
    assert!(xml(&mut client).await.contains("<on_crash>preserve</on_crash>"));
    assert_eq!(now("boot.crash_action").as_deref(), Some("halt"));
    assert!(action(&mut client, 2, 1).await.is_ok());
    assert!(xml(&mut client).await.contains("<on_crash>restart</on_crash>"));
    assert_eq!(now("boot.crash_action").as_deref(), Some("stop"));
    for (kind, wanted) in [(0, 1), (1, 2), (2, 2), (2, 4)] {
        assert_eq!(action(&mut client, kind, wanted).await, Err(Code::ConfigUnsupported as i32));
    }
    assert_eq!(action(&mut client, 3, 0).await, Err(Code::InvalidArg as i32));
    assert_eq!(action(&mut client, 0, 6).await, Err(Code::InvalidArg as i32));
    let timeout = async |client: &mut Client, seconds: i32| {
        let rest = arguments(|w| w.i32(seconds).u32(0));
        let procedure = number("DOMAIN_AGENT_SET_RESPONSE_TIMEOUT");
        client.call(procedure, &[&v1[..], &rest].concat()).await.map_err(|e| e.0)
    };
    assert_eq!(timeout(&mut client, 7).await, Ok(vec![0; 4]));
    assert_eq!(now("user.libvirt.agent_timeout").as_deref(), Some("7"));
    assert_eq!(timeout(&mut client, -3).await, Err(Code::InvalidArg as i32));
    assert_eq!(timeout(&mut client, 0).await, Err(Code::OperationUnsupported as i32));
    assert_eq!(timeout(&mut client, -1).await, Ok(vec![0; 4]));
    assert_eq!(now("user.libvirt.agent_timeout"), None);
}
