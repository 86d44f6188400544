//! What a domain has and can have of memory and processors, of its run and of its definition: `setmem`, `setmaxmem`, `setvcpus`,
//! `setvcpu`, `vcpucount`, and what documents say of it.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, domain, dump, ready},
    host::{arguments, number},
    support::{Client, Refused},
};
use karst_engine::{Context, compute::update::UpdateInstance};
use karst_frontend_libvirt::{
    error::Code,
    xdr::{Reader, Writer},
    xml::machine::read,
};
use karst_model::{access::Principal, instance::InstanceKind};

const LIVE: u32 = 1;
const CONFIG: u32 = 2;
const MAXIMUM: u32 = 4;
const GUEST: u32 = 8;

async fn call_of(
    client: &mut Client,
    name: &str,
    procedure: &str,
    write: impl for<'a> FnOnce(&'a mut Writer) -> &'a mut Writer,
) -> Result<Vec<u8>, Refused> {
    let domain = client.domain(name).await;
    client.call(number(procedure), &[domain, arguments(write)].concat()).await
}

async fn call(
    client: &mut Client,
    procedure: &str,
    write: impl for<'a> FnOnce(&'a mut Writer) -> &'a mut Writer,
) -> Result<Vec<u8>, Refused> {
    call_of(client, "v1", procedure, write).await
}

async fn set_memory(client: &mut Client, kib: u64, flags: u32) -> Result<(), Refused> {
    call(client, "DOMAIN_SET_MEMORY_FLAGS", |w| w.u64(kib).u32(flags)).await.map(drop)
}

async fn set_cpus(client: &mut Client, n: u32, flags: u32) -> Result<(), Refused> {
    call(client, "DOMAIN_SET_VCPUS_FLAGS", |w| w.u32(n).u32(flags)).await.map(drop)
}

async fn cpus(client: &mut Client, flags: u32) -> Result<i32, Refused> {
    let answer = call(client, "DOMAIN_GET_VCPUS_FLAGS", |w| w.u32(flags)).await?;
    Ok(Reader::new(&answer).i32().unwrap())
}

/// Memory that it can have, memory that it has, KiB, as its document says.
async fn memory(client: &mut Client, flags: u32) -> (u64, u64) {
    let machine = read::machine(&dump(client, "v1", flags).await).unwrap();
    (machine.memory, machine.current)
}

fn is<T: std::fmt::Debug>(result: Result<T, Refused>, code: Code, word: &str) {
    let refused = result.unwrap_err();
    assert!(refused.0 == code as i32 && refused.1.contains(word), "{word}: {refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_definition_says_what_a_machine_has_and_can_have() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let admin = Context::new(Principal::system());
    let config = |key: &str| {
        server.engine.instance(&admin, "default", "v1").unwrap().instance.config.get(key).cloned()
    };
    assert_eq!(cpus(&mut client, CONFIG).await, Ok(1));
    assert_eq!(cpus(&mut client, CONFIG | MAXIMUM).await, Ok(2));
    is(cpus(&mut client, LIVE).await, Code::OperationInvalid, "not running");
    let info = call(&mut client, "DOMAIN_GET_INFO", |w| w).await.unwrap();
    let mut r = Reader::new(&info);
    r.u32().unwrap();
    assert_eq!((r.u64().unwrap(), r.u64().unwrap(), r.u32().unwrap()), (262_144, 131_072, 1));

    set_memory(&mut client, 200_000, CONFIG).await.unwrap();
    assert_eq!(memory(&mut client, CONFIG).await, (262_144, 200_000));
    is(set_memory(&mut client, 262_145, CONFIG).await, Code::InvalidArg, "higher than max memory");
    set_memory(&mut client, 524_288, CONFIG | MAXIMUM).await.unwrap();
    assert_eq!(memory(&mut client, CONFIG).await, (524_288, 200_000));
    // In whole MiB, and what it has is not more than that.
    set_memory(&mut client, 100_000, CONFIG | MAXIMUM).await.unwrap();
    assert_eq!(memory(&mut client, CONFIG).await, (100_352, 100_352));
    assert_eq!(config("limits.memory").as_deref(), Some("100352KiB"));
    is(set_memory(&mut client, u64::MAX, CONFIG | MAXIMUM).await, Code::InvalidArg, "less than");

    is(set_cpus(&mut client, 3, CONFIG).await, Code::InvalidArg, "persistent domain: 3 > 2");
    set_cpus(&mut client, 4, CONFIG | MAXIMUM).await.unwrap();
    assert_eq!((cpus(&mut client, CONFIG).await, cpus(&mut client, CONFIG | MAXIMUM).await), (Ok(1), Ok(4)));
    set_cpus(&mut client, 3, CONFIG).await.unwrap();
    let shown = dump(&mut client, "v1", CONFIG).await;
    assert!(shown.contains("<vcpu placement='static' current='3'>4</vcpu>"), "{shown}");
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, "v1", CONFIG).await, shown);
    // As many as are left.
    set_cpus(&mut client, 2, CONFIG | MAXIMUM).await.unwrap();
    assert_eq!((cpus(&mut client, CONFIG).await, cpus(&mut client, CONFIG | MAXIMUM).await), (Ok(2), Ok(2)));
    assert_eq!(config("limits.cpu.maximum").as_deref(), Some("2"));
    is(set_cpus(&mut client, 0, CONFIG).await, Code::InvalidArg, "greater than zero");
    is(set_cpus(&mut client, 289, CONFIG | MAXIMUM).await, Code::OperationUnsupported, "289 > 288");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_changes_within_what_was_set_aside() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    set_memory(&mut client, 65_536, LIVE).await.unwrap();
    assert_eq!(memory(&mut client, 0).await, (262_144, 65_536));
    assert_eq!(memory(&mut client, CONFIG).await, (262_144, 131_072));
    set_memory(&mut client, 262_144, LIVE).await.unwrap();
    assert_eq!(memory(&mut client, 0).await, (262_144, 262_144));
    is(set_memory(&mut client, 262_145, LIVE).await, Code::InvalidArg, "higher than max memory");
    for flags in [LIVE | MAXIMUM, MAXIMUM, LIVE | CONFIG | MAXIMUM] {
        is(set_memory(&mut client, 300_000, flags).await, Code::OperationInvalid, "active domain");
    }
    // What is defined for the next start is none of the run's.
    set_memory(&mut client, 524_288, CONFIG | MAXIMUM).await.unwrap();
    assert_eq!(memory(&mut client, 0).await, (262_144, 262_144));
    assert_eq!(memory(&mut client, CONFIG).await, (524_288, 131_072));

    set_cpus(&mut client, 2, LIVE).await.unwrap();
    assert_eq!((cpus(&mut client, LIVE).await, cpus(&mut client, CONFIG).await), (Ok(2), Ok(1)));
    is(set_cpus(&mut client, 3, LIVE).await, Code::InvalidArg, "live domain: 3 > 2");
    is(set_cpus(&mut client, 4, LIVE | MAXIMUM).await, Code::OperationUnsupported, "live domain");
    let one = async |client: &mut Client, map: &str, state: i32, flags: u32| {
        call(client, "DOMAIN_SET_VCPU", |w| w.string(map).i32(state).u32(flags)).await
    };
    is(one(&mut client, "2", 1, LIVE).await, Code::InvalidArg, "not present in live config");
    is(one(&mut client, "0", 0, LIVE).await, Code::OperationUnsupported, "from the last one on");
    one(&mut client, "1", 0, LIVE).await.unwrap();
    assert_eq!(cpus(&mut client, LIVE).await, Ok(1));

    // As the system inside counts them, which has one.
    assert_eq!(cpus(&mut client, LIVE | GUEST).await, Ok(1));
    set_cpus(&mut client, 1, GUEST).await.unwrap();
    is(set_cpus(&mut client, 2, GUEST).await, Code::InvalidArg, "enabled vcpus in the domain: 2 > 1");
    is(set_cpus(&mut client, 1, GUEST | CONFIG).await, Code::InvalidArg, "guest flag");
    set_cpus(&mut client, 2, LIVE).await.unwrap();
    is(set_cpus(&mut client, 2, GUEST).await, Code::InternalError, "less cpu than requested");

    call(&mut client, "DOMAIN_DESTROY", |w| w).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    assert_eq!(memory(&mut client, 0).await, (524_288, 131_072));
    assert_eq!(cpus(&mut client, LIVE).await, Ok(1));

    // One that nobody said anything of begins with all that it can have.
    server.guest("v2", InstanceKind::VirtualMachine, true).await;
    call_of(&mut client, "v2", "DOMAIN_SET_MEMORY_FLAGS", |w| w.u64(524_288).u32(LIVE)).await.unwrap();
    let machine = read::machine(&dump(&mut client, "v2", 0).await).unwrap();
    assert_eq!((machine.memory, machine.current), (1_048_576, 524_288));
    // Nor does what the run was given by itself stand in the way of another size.
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v2").unwrap();
    let mut config = view.instance.config.clone();
    config.insert("limits.memory".into(), "2GiB".into());
    let request = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config,
        devices: view.instance.devices.clone(),
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: None,
    };
    let operation = server.engine.instance_update(&admin, "default", "v2", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    let machine = read::machine(&dump(&mut client, "v2", CONFIG).await).unwrap();
    assert_eq!((machine.memory, machine.current), (2_097_152, 2_097_152));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_processor_may_be_named_and_a_balloon_is_needed() {
    let (_server, mut client) = ready().await;
    let each = "<vcpus><vcpu id='0' enabled='yes' hotpluggable='no'/><vcpu id='1' enabled='no' hotpluggable='yes'/></vcpus>";
    let named = format!("{each}<os firmware");
    define(&mut client, &domain("v1", &[("<os firmware", &named)])).await.unwrap();
    let second = "<vcpu id='1' enabled='no' hotpluggable='yes'/>";
    assert!(dump(&mut client, "v1", CONFIG).await.contains(second));
    set_cpus(&mut client, 2, CONFIG).await.unwrap();
    let shown = dump(&mut client, "v1", CONFIG).await;
    assert!(!shown.contains(second) && shown.contains("<vcpu placement='static'>2</vcpu>"), "{shown}");
    let gap = named
        .replace("id='0' enabled='yes'", "id='0' enabled='no'")
        .replace("id='1' enabled='no'", "id='1' enabled='yes'");
    is(
        define(&mut client, &domain("v1", &[("<os firmware", &gap)])).await,
        Code::XmlError,
        "vcpu 0 can't be offline",
    );

    let often = [(
        "<input type='tablet'",
        "<memballoon model='virtio'><stats period='5'/></memballoon><input type='tablet'",
    )];
    define(&mut client, &domain("v1", &often)).await.unwrap();
    let shown = dump(&mut client, "v1", CONFIG).await;
    assert!(shown.contains("<stats period='5'/>"), "{shown}");
    let never = [(
        "<input type='tablet'",
        "<memballoon model='virtio'><stats period='x'/></memballoon><input type='tablet'",
    )];
    is(define(&mut client, &domain("v1", &never)).await, Code::XmlError, "'period' of <stats>");

    // Nothing would hold what is beside.
    let without = [("<input type='tablet'", "<memballoon model='none'/><input type='tablet'")];
    define(&mut client, &domain("v1", &without)).await.unwrap();
    assert_eq!(memory(&mut client, CONFIG).await, (262_144, 262_144));
    is(set_memory(&mut client, 131_072, CONFIG).await, Code::InvalidArg, "hardware.balloon");
    set_memory(&mut client, 524_288, CONFIG | MAXIMUM).await.unwrap();
    assert_eq!(memory(&mut client, CONFIG).await, (524_288, 524_288));
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    is(set_memory(&mut client, 131_072, LIVE).await, Code::OperationInvalid, "without the balloon device");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_volume_of_a_disk_grows_under_its_guest() {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let admin = Context::new(Principal::system());
    let size = || server.engine.custom_volume(&admin, "default", "default", "d1").unwrap().size.unwrap();
    let first = size().bytes();
    let resize = async |client: &mut Client, disk: &str, size: u64, flags: u32| {
        call(client, "DOMAIN_BLOCK_RESIZE", |w| w.string(disk).u64(size).u32(flags)).await
    };
    is(resize(&mut client, "vda", first * 2, 1).await, Code::OperationInvalid, "not running");
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    resize(&mut client, "vda", first * 2, 1).await.unwrap();
    assert_eq!(size().bytes(), first * 2);
    // In KiB, by the path of its volume.
    resize(&mut client, "/karst/default/d1", first * 3 / 1024, 0).await.unwrap();
    assert_eq!(size().bytes(), first * 3);
    is(resize(&mut client, "vda", first, 1).await, Code::OperationUnsupported, "cannot shrink");
    is(resize(&mut client, "sdc", first * 2, 1).await, Code::OperationUnsupported, "readonly disk 'sdc'");
    is(resize(&mut client, "vdz", first * 2, 1).await, Code::InvalidArg, "vdz");
    is(resize(&mut client, "vda", u64::MAX, 0).await, Code::InvalidArg, "less than");
}
