//! Networks that are started and stopped, begin with their host or not, and are defined otherwise than they run.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{Client, Refused, Server, argument};
use karst_engine::Context;
use karst_frontend_libvirt::{error::Code, xdr::Reader};
use karst_model::{access::Principal, instance::InstanceKind};

const UUID: &str = "3a1b0e4c-5d0d-4a0f-9d5d-0f3f6f2b1c22";
const DEFINE: i32 = 432;
const CREATE_XML: i32 = 437;
const START: i32 = 39;
const DESTROY: i32 = 42;
const UNDEFINE: i32 = 49;
const DUMP: i32 = 43;

fn document(domain: &str) -> String {
    format!(
        "<network><name>n1</name><uuid>{UUID}</uuid><forward mode='nat'/><domain name='{domain}'/>\
         <ip address='10.99.8.1' prefix='24'><dhcp><range start='10.99.8.20' end='10.99.8.30'/></dhcp></ip></network>"
    )
}

async fn with_xml(client: &mut Client, procedure: i32, xml: &str) -> Result<Vec<u8>, Refused> {
    let payload = argument(|w| {
        w.string(xml).u32(0);
    });
    client.call(procedure, &payload).await
}

async fn number(client: &mut Client, procedure: i32, network: &[u8]) -> i32 {
    Reader::new(&client.call(procedure, network).await.unwrap()).i32().unwrap()
}

/// Active, persistent, with its host.
async fn is(client: &mut Client, network: &[u8]) -> [i32; 3] {
    let mut all = [0; 3];
    for (at, procedure) in [152, 153, 44].into_iter().enumerate() {
        all[at] = number(client, procedure, network).await;
    }
    all
}

async fn dump(client: &mut Client, network: &[u8], flags: u32) -> String {
    let flags = argument(|w| {
        w.u32(flags);
    });
    let payload = client.call(DUMP, &[network, &flags].concat()).await.unwrap();
    Reader::new(&payload).string().unwrap()
}

/// Names of the networks that have what the flags ask for.
async fn listed(client: &mut Client, flags: u32) -> Vec<String> {
    let payload = argument(|w| {
        w.i32(1).u32(flags);
    });
    let payload = client.call(283, &payload).await.unwrap();
    let mut r = Reader::new(&payload);
    r.array(100, |r| {
        let name = r.string()?;
        r.uuid()?;
        Ok(name)
    })
    .unwrap()
}

async fn set_autostart(client: &mut Client, network: &[u8], wanted: i32) -> Result<(), Refused> {
    let wanted = argument(|w| {
        w.i32(wanted);
    });
    client.call(48, &[network, &wanted].concat()).await.map(drop)
}

async fn update(client: &mut Client, network: &[u8], xml: &str, flags: u32) -> Result<(), Refused> {
    let rest = argument(|w| {
        w.u32(3).u32(5).i32(-1).string(xml).u32(flags);
    });
    client.call(291, &[network, &rest].concat()).await.map(drop)
}

fn invalid<T: std::fmt::Debug>(answer: Result<T, Refused>, says: &str) {
    let refused = answer.unwrap_err();
    assert!(refused.0 == Code::OperationInvalid as i32 && refused.1.contains(says), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_is_defined_then_started() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let n1 = with_xml(&mut client, DEFINE, &document("a.test")).await.unwrap();
    assert_eq!(is(&mut client, &n1).await, [0, 1, 0]);
    let n1_alone = vec!["n1".to_owned()];
    for flags in [1, 1 | 4, 1 | 32, 4 | 32] {
        assert_eq!(listed(&mut client, flags).await, n1_alone, "{flags}");
    }
    for flags in [2, 8, 16] {
        assert!(!listed(&mut client, flags).await.contains(&"n1".to_owned()), "{flags}");
    }
    assert_eq!(number(&mut client, 50, &[]).await, 1, "defined networks");
    invalid(client.call(DESTROY, &n1).await, "network 'n1' is not active");
    set_autostart(&mut client, &n1, 1).await.unwrap();
    client.call(START, &n1).await.unwrap();
    assert_eq!(is(&mut client, &n1).await, [1, 1, 1]);
    invalid(client.call(START, &n1).await, "network is already active");
    assert!(listed(&mut client, 2 | 16).await.contains(&"n1".to_owned()));
    // Defined anew it runs on by what it ran by.
    with_xml(&mut client, DEFINE, &document("b.test")).await.unwrap();
    let (live, defined) = (dump(&mut client, &n1, 0).await, dump(&mut client, &n1, 1).await);
    assert!(live.contains("a.test") && !live.contains("b.test"), "{live}");
    assert!(defined.contains("b.test") && !defined.contains("a.test"), "{defined}");
    // Each side by itself.
    let range = |n: u8| format!("<range start='10.99.8.{n}' end='10.99.8.{}'/>", n + 5);
    update(&mut client, &n1, &range(40), 1).await.unwrap();
    update(&mut client, &n1, &range(50), 2).await.unwrap();
    update(&mut client, &n1, &range(60), 3).await.unwrap();
    update(&mut client, &n1, &range(70), 0).await.unwrap();
    let (live, defined) = (dump(&mut client, &n1, 0).await, dump(&mut client, &n1, 1).await);
    let has = |text: &str| [40, 50, 60, 70].map(|n| text.contains(&range(n)));
    assert_eq!((has(&live), has(&defined)), ([true, false, true, true], [false, true, true, false]));
    // Stopped it is its definition.
    client.call(DESTROY, &n1).await.unwrap();
    assert_eq!(is(&mut client, &n1).await, [0, 1, 1]);
    assert_eq!(dump(&mut client, &n1, 0).await, defined);
    invalid(update(&mut client, &n1, &range(80), 1).await, "network is not running");
    client.call(START, &n1).await.unwrap();
    assert_eq!(dump(&mut client, &n1, 0).await, defined);
    // Undefined it is transient, and goes when it is stopped.
    client.call(UNDEFINE, &n1).await.unwrap();
    assert_eq!(is(&mut client, &n1).await, [1, 0, 0]);
    invalid(client.call(UNDEFINE, &n1).await, "can't undefine transient network");
    invalid(set_autostart(&mut client, &n1, 1).await, "cannot set autostart for transient network");
    invalid(update(&mut client, &n1, &range(80), 2).await, "persistent config of a transient network");
    client.call(DESTROY, &n1).await.unwrap();
    assert_eq!(client.call(START, &n1).await.unwrap_err().0, Code::NoNetwork as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transient_network_is_made_and_goes() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let n1 = with_xml(&mut client, CREATE_XML, &document("a.test")).await.unwrap();
    assert_eq!(is(&mut client, &n1).await, [1, 0, 0]);
    invalid(
        with_xml(&mut client, CREATE_XML, &document("b.test")).await,
        "network is already active as 'n1'",
    );
    // A definition makes it one that stays.
    with_xml(&mut client, DEFINE, &document("b.test")).await.unwrap();
    assert_eq!(is(&mut client, &n1).await, [1, 1, 0]);
    client.call(DESTROY, &n1).await.unwrap();
    // One that is defined runs by another document until it is stopped.
    with_xml(&mut client, CREATE_XML, &document("c.test")).await.unwrap();
    assert_eq!(is(&mut client, &n1).await, [1, 1, 0]);
    assert!(dump(&mut client, &n1, 0).await.contains("c.test"));
    assert!(dump(&mut client, &n1, 1).await.contains("b.test"));
    client.call(DESTROY, &n1).await.unwrap();
    assert!(dump(&mut client, &n1, 0).await.contains("b.test"));
    client.call(UNDEFINE, &n1).await.unwrap();
    assert_eq!(client.call(DESTROY, &n1).await.unwrap_err().0, Code::NoNetwork as i32);
    // Who may not change anything makes none.
    let mut reader = server.open("ro", "qemu:///system").await;
    let refused = with_xml(&mut reader, CREATE_XML, &document("a.test")).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationDenied as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_and_a_network_that_is_stopped() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    server.guest("v2", InstanceKind::VirtualMachine, false).await;
    let admin = Context::new(Principal::system());
    let name = server.engine.networks(&admin, "default").unwrap()[0].name.to_string();
    let mut client = server.open("full", "qemu:///system").await;
    let payload = argument(|w| {
        w.string(&name);
    });
    let network = client.call(46, &payload).await.unwrap();
    client.call(DESTROY, &network).await.unwrap();
    // The guest runs on; nobody starts on it.
    let (v1, v2) = (client.domain("v1").await, client.domain("v2").await);
    assert!(server.engine.instance(&admin, "default", "v1").unwrap().status.is_up());
    let refused = client.call(9, &v2).await.unwrap_err();
    let says = format!("network \"{name}\" is not active; start it first: karst network start {name}");
    assert!(refused.1.contains(&says), "{refused:?}");
    // No ports, no leases.
    let rest = argument(|w| {
        w.i32(1).u32(0);
    });
    let payload = client.call(404, &[network.clone(), rest].concat()).await.unwrap();
    assert_eq!(Reader::new(&payload).u32().unwrap(), 0);
    // Its guests go back onto it, and others start.
    client.call(START, &network).await.unwrap();
    client.call(9, &v2).await.unwrap();
    for domain in [v1, v2] {
        client.call(12, &domain).await.unwrap();
    }
}
