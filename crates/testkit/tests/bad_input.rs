//! Wrong input to the engine's use cases of instances (making, changing, power, files, exec, moves, rebuilds), profiles, projects,
//! networks, pools, images, recovery, backups, checkpoints, copies of disks and memory in files: the right class of error, the
//! field named, nothing changed, not even in the raw store. What else changes something (snapshots, volumes, ACLs, roles,
//! certificates, settings) is sent wrong input over HTTP, by `every_endpoint.rs` of the Incus front end, whose table has all paths.

use futures::future::BoxFuture;
use karst_engine::{
    backups::{
        create::CreateBackup,
        import::{ImportInstance, ImportVolume},
    },
    checkpoints::{CreateCheckpoint, backup::BeginBackup},
    compute::{
        create::{CreateInstance, InstanceSource},
        disk_copy::{CopyDisk, CopyTarget},
        memory_files::SaveMemory,
        power::PowerRequest,
        relocate::MoveInstance,
        update::UpdateInstance,
    },
    images::{ImageOptions, UpdateImage, publish::PublishImage},
    network::{CreateNetwork, UpdateNetwork, life::NetworkSides},
    recover::RecoverPool,
    snapshots::Origin,
    storage::CreatePool,
    tenancy::UpdateProfile,
};
use karst_env::SeededEnv;
use karst_model::{
    Config, Error, ErrorKind, Result, Vmid,
    device::Devices,
    guest::{ExecRequest, FileKind, FileWrite},
    instance::{InstanceKind, PowerAction},
    pool_life::PoolChange,
};
use karst_store::list_prefix;
use karst_testkit::{World, scenarios::container};

type Call = for<'a> fn(&'a World) -> BoxFuture<'a, Result<()>>;

struct Case {
    what: &'static str,
    kind: ErrorKind,
    /// `""`: none is demanded, because the request as a whole is at fault.
    field: &'static str,
    /// Part of the message: the name at fault, or the fix.
    says: &'static str,
    call: Call,
}

fn config(pairs: &[(&str, &str)]) -> Config {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn device(name: &str, pairs: &[(&str, &str)]) -> Devices {
    [(name.to_owned(), pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())].into()
}

fn with_config(pairs: &[(&str, &str)]) -> CreateInstance {
    CreateInstance { config: config(pairs), ..container("new") }
}

fn with_device(name: &str, pairs: &[(&str, &str)]) -> CreateInstance {
    CreateInstance { devices: device(name, pairs), ..container("new") }
}

fn of_profiles(profiles: &[&str]) -> CreateInstance {
    CreateInstance { profiles: Some(profiles.iter().map(|p| (*p).to_owned()).collect()), ..container("new") }
}

fn update(pairs: &[(&str, &str)], devices: Devices) -> UpdateInstance {
    UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: config(pairs),
        devices,
        profiles: vec!["default".into()],
        if_version: None,
    }
}

fn force(action: PowerAction) -> PowerRequest {
    PowerRequest { action, force: true, timeout: None, stateful: false }
}

fn exec(command: &[&str]) -> ExecRequest {
    ExecRequest {
        command: command.iter().map(|c| (*c).to_owned()).collect(),
        environment: Default::default(),
        uid: 0,
        gid: 0,
        cwd: None,
        terminal: None,
        term: None,
    }
}

fn file(path: &str) -> FileWrite {
    FileWrite {
        path: path.into(),
        kind: FileKind::Directory,
        uid: None,
        gid: None,
        mode: None,
        append: false,
        target: None,
    }
}

fn pull() -> karst_engine::compute::disk_copy::merge::MergeDisk {
    use karst_engine::compute::disk_copy::merge::{MergeDisk, MergeLayers};
    MergeDisk { device: None, what: MergeLayers::Pull { base: None }, hold: false, speed: 0 }
}

fn disk_copy(device: Option<&str>, to: CopyTarget) -> CopyDisk {
    CopyDisk { device: device.map(str::to_owned), to, hold: false, speed: 0, synchronous: false }
}

fn save(path: &str) -> SaveMemory {
    SaveMemory { path: path.into(), document: String::new(), paused: None }
}

fn network(pairs: &[(&str, &str)]) -> CreateNetwork {
    CreateNetwork { name: "new".into(), config: config(pairs), ..Default::default() }
}

const P: &str = "default";
const ROOT: &[(&str, &str)] = &[("type", "disk"), ("path", "/"), ("pool", "default")];

macro_rules! cases {
    ($( $what:literal => $kind:ident, $field:literal, $says:literal, |$w:ident| $call:expr; )+) => {
        vec![$( Case {
            what: $what,
            kind: ErrorKind::$kind,
            field: $field,
            says: $says,
            call: |$w| Box::pin(async move { $call.await.map(drop) }),
        } ),+]
    };
}

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    cases! {
        // Creating instances.
        "unknown key" => Invalid, "config.limits.memroy", "limits.memory", |w| w.engine.instance_create(&w.admin, P, with_config(&[("limits.memroy", "1GiB")]));
        "wrong size" => Invalid, "config.limits.memory", "lots", |w| w.engine.instance_create(&w.admin, P, with_config(&[("limits.memory", "lots")]));
        "no snapshots kept" => Invalid, "config.snapshots.keep", "from 1", |w| w.engine.instance_create(&w.admin, P, with_config(&[("snapshots.keep", "0")]));
        "more memory than the host has" => Invalid, "config.limits.memory", "1% to 100%", |w| w.engine.instance_create(&w.admin, P, with_config(&[("limits.memory", "150%")]));
        "too little memory" => Invalid, "config.limits.memory", "4MiB", |w| w.engine.instance_create(&w.admin, P, with_config(&[("limits.memory", "1MiB")]));
        "huge size" => Invalid, "config.limits.memory", "99999999999999999999999", |w| w.engine.instance_create(&w.admin, P, with_config(&[("limits.memory", "99999999999999999999999TiB")]));
        "overflowing size" => Invalid, "config.limits.memory", "EiB", |w| w.engine.instance_create(&w.admin, P, with_config(&[("limits.memory", "9999999EiB")]));
        "no CPU" => Invalid, "config.limits.cpu", "1 to 4096", |w| w.engine.instance_create(&w.admin, P, with_config(&[("limits.cpu", "0")]));
        "no processes" => Invalid, "config.limits.processes", "whole number", |w| w.engine.instance_create(&w.admin, P, with_config(&[("limits.processes", "-1")]));
        "NUL in a value" => Invalid, "config.user.x", "NUL", |w| w.engine.instance_create(&w.admin, P, with_config(&[("user.x", "a\0b")]));
        "NUL in a key" => Invalid, "config", "", |w| w.engine.instance_create(&w.admin, P, with_config(&[("user.a\0b", "x")]));
        "huge value" => Invalid, "config.user.x", "1 MiB", |w| { let big = "x".repeat((1 << 20) + 1); w.engine.instance_create(&w.admin, P, with_config(&[("user.x", &big)])) };
        "huge request" => TooLarge, "", "too large", |w| { let big = "x".repeat(600 << 10); w.engine.instance_create(&w.admin, P, with_config(&[("user.x", &big)])) };
        "volatile key" => Invalid, "config.volatile.uuid", "volatile", |w| w.engine.instance_create(&w.admin, P, with_config(&[("volatile.uuid", "x")]));
        "privileged" => Invalid, "config.security.privileged", "boolean", |w| w.engine.instance_create(&w.admin, P, with_config(&[("security.privileged", "root")]));
        "way to stop" => Invalid, "config.boot.host_shutdown_action", "force-stop", |w| w.engine.instance_create(&w.admin, P, with_config(&[("boot.host_shutdown_action", "pause")]));
        "key of the other kind" => Invalid, "config.limits.processes", "virtual-machine", |w| w.engine.instance_create(&w.admin, P, CreateInstance { kind: InstanceKind::VirtualMachine, ..with_config(&[("limits.processes", "5")]) });
        "taken name" => Conflict, "name", "run", |w| w.engine.instance_create(&w.admin, P, container("run"));
        "name with a slash" => Invalid, "name", "../x", |w| w.engine.instance_create(&w.admin, P, container("../x"));
        "name with NUL" => Invalid, "name", "", |w| w.engine.instance_create(&w.admin, P, container("a\0"));
        "long name" => Invalid, "name", "63", |w| w.engine.instance_create(&w.admin, P, container(&"a".repeat(64)));
        "name of a dot" => Invalid, "name", "", |w| w.engine.instance_create(&w.admin, P, container("."));
        "missing project" => NotFound, "", "nope", |w| w.engine.instance_create(&w.admin, "nope", container("new"));
        "missing profile" => NotFound, "profiles[1]", "nope", |w| w.engine.instance_create(&w.admin, P, of_profiles(&["default", "nope"]));
        "profile twice" => Invalid, "profiles[1]", "twice", |w| w.engine.instance_create(&w.admin, P, of_profiles(&["default", "default"]));
        "no root disk" => Invalid, "devices", "root disk", |w| w.engine.instance_create(&w.admin, P, of_profiles(&[]));
        "two root disks" => Invalid, "devices.root", "root disks", |w| w.engine.instance_create(&w.admin, P, with_device("again", ROOT));
        "missing pool" => NotFound, "devices.root.pool", "nope", |w| w.engine.instance_create(&w.admin, P, with_device("root", &[("type", "disk"), ("path", "/"), ("pool", "nope")]));
        "wrong size of the root" => Invalid, "devices.root.size", "-5GiB", |w| w.engine.instance_create(&w.admin, P, with_device("root", &[("type", "disk"), ("path", "/"), ("pool", "default"), ("size", "-5GiB")]));
        "a volume made with what it has not" => Unsupported, "devices.root.initial.zfs.blocksize", "initial.full_copy", |w| w.engine.instance_create(&w.admin, P, with_device("root", &[("type", "disk"), ("path", "/"), ("pool", "default"), ("initial.zfs.blocksize", "16KiB")]));
        "a key of Incus that is not there" => Unsupported, "config.raw.qemu", "hardware.*", |w| w.engine.instance_create(&w.admin, P, with_config(&[("raw.qemu", "-S")]));
        "missing network" => NotFound, "devices.eth1.network", "nope", |w| w.engine.instance_create(&w.admin, P, with_device("eth1", &[("type", "nic"), ("network", "nope")]));
        "address outside" => Invalid, "devices.eth1.ipv4.address", "9.9.9.9", |w| w.engine.instance_create(&w.admin, P, with_device("eth1", &[("type", "nic"), ("network", "karstbr0"), ("ipv4.address", "9.9.9.9")]));
        "interface twice" => Invalid, "devices.eth1.name", "eth0", |w| w.engine.instance_create(&w.admin, P, with_device("eth1", &[("type", "nic"), ("network", "karstbr0"), ("name", "eth0")]));
        "wrong MAC" => Invalid, "devices.eth1.hwaddr", "MAC", |w| w.engine.instance_create(&w.admin, P, with_device("eth1", &[("type", "nic"), ("network", "karstbr0"), ("hwaddr", "zz")]));
        "unknown device key" => Invalid, "devices.eth1.netwrk", "network", |w| w.engine.instance_create(&w.admin, P, with_device("eth1", &[("type", "nic"), ("netwrk", "x")]));
        "unknown device type" => Invalid, "devices.x.type", "disk", |w| w.engine.instance_create(&w.admin, P, with_device("x", &[("type", "dsk")]));
        "wrong device name" => Invalid, "devices.a b", "", |w| w.engine.instance_create(&w.admin, P, with_device("a b", &[("type", "none")]));
        "missing image" => NotFound, "", "nope", |w| w.engine.instance_create(&w.admin, P, CreateInstance { source: InstanceSource::Image("nope".into()), ..container("new") });
        "image of the other kind" => Invalid, "source.alias", "container", |w| w.engine.instance_create(&w.admin, P, CreateInstance { kind: InstanceKind::VirtualMachine, source: InstanceSource::Image("debian/12".into()), ..container("new") });
        "image of a missing project" => NotFound, "source.project", "nope", |w| w.engine.instance_create(&w.admin, P, CreateInstance { source: InstanceSource::ImageOf { project: "nope".into(), reference: "debian/12".into() }, ..container("new") });
        "missing image of a project" => NotFound, "", "nope", |w| w.engine.instance_create(&w.admin, P, CreateInstance { source: InstanceSource::ImageOf { project: P.into(), reference: "nope".into() }, ..container("new") });
        "architecture of another machine" => Invalid, "architecture", "armv7l", |w| async { w.engine.demand_architecture(&w.admin, None, "armv7l") };
        "unknown architecture" => Invalid, "architecture", "nonsense", |w| async { w.engine.demand_architecture(&w.admin, None, "nonsense") };
        "VMID of another" => Conflict, "vmid", "100 is taken", |w| w.engine.instance_create(&w.admin, P, CreateInstance { vmid: Some(Vmid(100)), ..container("new") });
        "VMID that was given out before" => Conflict, "vmid", "4000 was given out before", |w| w.engine.instance_create(&w.admin, P, CreateInstance { vmid: Some(Vmid(4000)), ..container("new") });
        "VMID below the range" => Invalid, "vmid", "100 to 999999999", |w| w.engine.instance_create(&w.admin, P, CreateInstance { vmid: Some(Vmid(99)), ..container("new") });
        "VMID above the range" => Invalid, "vmid", "100 to 999999999", |w| w.engine.instance_create(&w.admin, P, CreateInstance { vmid: Some(Vmid(1_000_000_000)), ..container("new") });
        "missing node" => NotFound, "target", "nope", |w| w.engine.instance_create(&w.admin, P, CreateInstance { target: Some("nope".into()), ..container("new") });
        // Changing them.
        "update of a missing one" => NotFound, "", "nope", |w| w.engine.instance_update(&w.admin, P, "nope", update(&[], Devices::new()));
        "update to an unknown key" => Invalid, "config.limits.cpus", "limits.cpu", |w| w.engine.instance_update(&w.admin, P, "run", update(&[("limits.cpus", "1")], Devices::new()));
        "update If-Match" => PreconditionFailed, "", "changed", |w| w.engine.instance_update(&w.admin, P, "run", UpdateInstance { if_version: Some(99), ..update(&[], Devices::new()) });
        "update to another pool" => Unsupported, "devices.root.pool", "pool", |w| w.engine.instance_update(&w.admin, P, "still", update(&[], device("root", &[("type", "disk"), ("path", "/"), ("pool", "second")])));
        "update to a shrinking disk" => Invalid, "devices.root.size", "shrink", |w| w.engine.instance_update(&w.admin, P, "vm", update(&[], device("root", &[("type", "disk"), ("path", "/"), ("pool", "default"), ("size", "1GiB")])));
        "NIC with a key of another kind" => Invalid, "devices.eth1.limits.max", "macvlan", |w| w.engine.instance_create(&w.admin, P, with_device("eth1", &[("type", "nic"), ("nictype", "macvlan"), ("parent", "granted0"), ("limits.max", "1Mbit")]));
        "static address on a bridge of the host" => Invalid, "devices.eth1.ipv4.address", "bridge of the host", |w| w.engine.instance_create(&w.admin, P, with_device("eth1", &[("type", "nic"), ("nictype", "bridged"), ("parent", "granted0"), ("ipv4.address", "10.0.0.5")]));
        "update without a root" => Invalid, "devices", "root disk", |w| w.engine.instance_update(&w.admin, P, "still", UpdateInstance { profiles: vec![], ..update(&[], Devices::new()) });
        "huge update" => TooLarge, "", "too large", |w| { let big = "x".repeat(600 << 10); let u = update(&[("user.x", &big)], Devices::new()); async move { w.engine.instance_update(&w.admin, P, "run", u).await } };
        "rename of a running one" => Conflict, "", "stop it", |w| w.engine.instance_rename(&w.admin, P, "run", "other");
        "rename to a taken name" => Conflict, "name", "run", |w| w.engine.instance_rename(&w.admin, P, "still", "run");
        "rename to a wrong name" => Invalid, "name", "a/b", |w| w.engine.instance_rename(&w.admin, P, "still", "a/b");
        "delete of a running one" => Conflict, "", "stop it", |w| w.engine.instance_delete(&w.admin, P, "run");
        "delete of a missing one" => NotFound, "", "nope", |w| w.engine.instance_delete(&w.admin, P, "nope");
        "start of a running one" => Conflict, "", "running", |w| w.engine.instance_power(&w.admin, P, "run", force(PowerAction::Start));
        "stop of a stopped one" => Conflict, "", "stopped", |w| w.engine.instance_power(&w.admin, P, "still", force(PowerAction::Stop));
        "restart of a stopped one" => Conflict, "", "start it", |w| w.engine.instance_power(&w.admin, P, "still", force(PowerAction::Restart));
        "freeze of a stopped one" => Conflict, "", "not running", |w| w.engine.instance_power(&w.admin, P, "still", force(PowerAction::Freeze));
        "unfreeze of a running one" => Conflict, "", "not frozen", |w| w.engine.instance_power(&w.admin, P, "run", force(PowerAction::Unfreeze));
        "stop with all the time there is" => Invalid, "timeout", "86400", |w| w.engine.instance_power(&w.admin, P, "run", PowerRequest { force: false, timeout: Some(std::time::Duration::from_secs(i64::MAX as u64)), ..force(PowerAction::Stop) });
        "restart with more than a day" => Invalid, "timeout", "86400", |w| w.engine.instance_power(&w.admin, P, "run", PowerRequest { force: false, timeout: Some(std::time::Duration::from_secs(86_401)), ..force(PowerAction::Restart) });
        "power of a missing one" => NotFound, "", "nope", |w| w.engine.instance_power(&w.admin, P, "nope", force(PowerAction::Start));
        // Guests.
        "exec in a stopped one" => Conflict, "", "start it", |w| w.engine.exec(&w.admin, P, "still", exec(&["true"]));
        "exec of nothing" => Invalid, "command", "empty", |w| w.engine.exec(&w.admin, P, "run", exec(&[]));
        "exec with NUL" => Invalid, "command", "NUL", |w| w.engine.exec(&w.admin, P, "run", exec(&["a\0"]));
        "exec in a relative directory" => Invalid, "cwd", "absolute", |w| w.engine.exec(&w.admin, P, "run", ExecRequest { cwd: Some("x".into()), ..exec(&["true"]) });
        "console of a stopped one" => Conflict, "", "start it", |w| w.engine.console(&w.admin, P, "still", false);
        "relative path" => Invalid, "path", "absolute", |w| w.engine.file_write(&w.admin, P, "run", file("x"));
        "path with NUL" => Invalid, "path", "", |w| w.engine.file_write(&w.admin, P, "run", file("/a\0"));
        "long path" => Invalid, "path", "", |w| w.engine.file_write(&w.admin, P, "run", file(&format!("/{}", "a".repeat(5000))));
        "wrong mode" => Invalid, "mode", "07777", |w| w.engine.file_write(&w.admin, P, "run", FileWrite { mode: Some(0o17777), ..file("/x") });
        "link to nothing" => Invalid, "target", "target", |w| w.engine.file_write(&w.admin, P, "run", FileWrite { kind: FileKind::Symlink, ..file("/x") });
        "files of a stopped machine" => Conflict, "", "runs", |w| w.engine.file_open(&w.admin, P, "vm", "/");
        // Profiles.
        "profile with an unknown key" => Invalid, "config.limits.memry", "limits.memory", |w| w.engine.profile_create(&w.admin, P, "new", UpdateProfile { config: config(&[("limits.memry", "1")]), ..Default::default() });
        "profile with a volatile key" => Invalid, "config.volatile.x", "", |w| w.engine.profile_create(&w.admin, P, "new", UpdateProfile { config: config(&[("volatile.x", "1")]), ..Default::default() });
        "profile with a taken name" => Conflict, "name", "default", |w| w.engine.profile_create(&w.admin, P, "default", UpdateProfile::default());
        "profile with a wrong name" => Invalid, "name", "", |w| w.engine.profile_create(&w.admin, P, "a b", UpdateProfile::default());
        "huge profile" => TooLarge, "", "", |w| { let big = "x".repeat(1 << 20); let c = config(&[("user.a", &big), ("user.b", &big)]); w.engine.profile_create(&w.admin, P, "new", UpdateProfile { config: c, ..Default::default() }) };
        "profile edit that takes the root disk of a user" => Invalid, "devices", "would be invalid", |w| w.engine.profile_update(&w.admin, P, "default", UpdateProfile::default());
        "profile edit that names a missing network" => NotFound, "devices.eth9.network", "nope", |w| { let mut d = w.engine.profile(&w.admin, P, "default").unwrap().devices.clone(); d.extend(device("eth9", &[("type", "nic"), ("network", "nope")])); w.engine.profile_update(&w.admin, P, "default", UpdateProfile { devices: d, ..Default::default() }) };
        "profile If-Match" => PreconditionFailed, "", "changed", |w| w.engine.profile_update(&w.admin, P, "default", UpdateProfile { if_version: Some(99), ..Default::default() });
        "rename of the default profile" => Conflict, "", "default", |w| w.engine.profile_rename(&w.admin, P, "default", "x");
        "rename of a missing profile" => NotFound, "", "nope", |w| w.engine.profile_rename(&w.admin, P, "nope", "x");
        "delete of a used profile" => Conflict, "", "used", |w| w.engine.profile_delete(&w.admin, P, "used");
        // Backups.
        "backup of nothing" => NotFound, "", "nope", |w| w.engine.backup_create(&w.admin, Origin::Instance { project: P, name: "nope" }, CreateBackup::default());
        "import of an upload that is gone" => NotFound, "", "send it again", |w| w.engine.instance_import(&w.admin, P, ImportInstance { upload: karst_model::BackupId(uuid::Uuid::from_u128(9)), name: None, pool: None });
        "disc with a wrong name" => Invalid, "name", "", |w| w.engine.volume_import(&w.admin, P, "default", ImportVolume { upload: karst_model::BackupId(uuid::Uuid::from_u128(9)), name: Some("a/b".into()), disc: true });
        // Projects.
        "project with an unknown key" => Invalid, "config.features.image", "features.images", |w| w.engine.project_create(&w.admin, "new", "", config(&[("features.image", "true")]));
        "project with a wrong value" => Invalid, "config.features.images", "boolean", |w| w.engine.project_create(&w.admin, "new", "", config(&[("features.images", "perhaps")]));
        "project with a taken name" => Conflict, "name", "default", |w| w.engine.project_create(&w.admin, P, "", Config::new());
        "project with a wrong name" => Invalid, "name", "", |w| w.engine.project_create(&w.admin, "a/b", "", Config::new());
        "project If-Match" => PreconditionFailed, "", "changed", |w| w.engine.project_update(&w.admin, "other", "x", Config::new(), Some(99));
        "rename of the default project" => Conflict, "", "default", |w| w.engine.project_rename(&w.admin, P, "x");
        "rename of a project to a taken name" => Conflict, "name", "default", |w| w.engine.project_rename(&w.admin, "other", P);
        "delete of a project with content" => Conflict, "", "not empty", |w| w.engine.project_delete(&w.admin, "other");
        "delete of a missing project" => NotFound, "", "nope", |w| w.engine.project_delete(&w.admin, "nope");
        // Networks and pools.
        "network with an unknown key" => Invalid, "config.ipv4.adress", "ipv4.address", |w| w.engine.network_create(&w.admin, P, network(&[("ipv4.adress", "x")]));
        "network with a wrong address" => Invalid, "config.ipv4.address", "10.1.2.0/24", |w| w.engine.network_create(&w.admin, P, network(&[("ipv4.address", "10.1.2.0/24")]));
        "network that overlaps" => Conflict, "config.ipv4.address", "net1", |w| w.engine.network_create(&w.admin, P, network(&[("ipv4.address", "10.20.0.1/16")]));
        "network with a taken name" => Conflict, "name", "net1", |w| w.engine.network_create(&w.admin, P, CreateNetwork { name: "net1".into(), ..network(&[("ipv4.address", "10.99.0.1/24")]) });
        "network with a long name" => Invalid, "name", "15", |w| w.engine.network_create(&w.admin, P, CreateNetwork { name: "a-very-long-interface".into(), ..network(&[]) });
        "network with a name for another directory" => Invalid, "name", "", |w| w.engine.network_create(&w.admin, P, CreateNetwork { name: "../x".into(), ..network(&[]) });
        "network update that overlaps" => Conflict, "config.ipv4.address", "karstbr0", |w| { let c = w.engine.network(&w.admin, P, "karstbr0").unwrap().config.clone(); w.engine.network_update(&w.admin, P, "net1", UpdateNetwork { description: String::new(), config: c, if_version: None }) };
        "network that is started twice" => Conflict, "", "active already", |w| w.engine.network_start(&w.admin, P, "net1");
        "network that nobody has, started" => NotFound, "", "not found", |w| w.engine.network_start(&w.admin, P, "nonet");
        "network defined with a key that nobody knows" => Invalid, "config.ipv4.adress", "ipv4.address", |w| w.engine.network_define(&w.admin, P, "net1", UpdateNetwork { description: String::new(), config: config(&[("ipv4.adress", "none")]), if_version: None });
        "network definition If-Match" => PreconditionFailed, "", "changed", |w| w.engine.network_define(&w.admin, P, "net1", UpdateNetwork { description: String::new(), config: Config::new(), if_version: Some(99) });
        "run of a network that overlaps" => Conflict, "config.ipv4.address", "karstbr0", |w| { let c = w.engine.network(&w.admin, P, "karstbr0").unwrap().config.clone(); w.engine.network_change_sides(&w.admin, P, "net1", NetworkSides { running: Some(c), ..Default::default() }) };
        "network If-Match" => PreconditionFailed, "", "changed", |w| w.engine.network_update(&w.admin, P, "net1", UpdateNetwork { description: String::new(), config: Config::new(), if_version: Some(99) });
        "network on an interface that the host does not grant" => Forbidden, "config.parent", "policy", |w| w.engine.network_create(&w.admin, P, CreateNetwork { kind: karst_model::uplink::NetworkKind::Macvlan, ..network(&[("parent", "eth7")]) });
        "network of an interface with a key of bridges" => Invalid, "config.ipv4.address", "macvlan", |w| w.engine.network_create(&w.admin, P, CreateNetwork { kind: karst_model::uplink::NetworkKind::Macvlan, ..network(&[("parent", "granted0"), ("ipv4.address", "10.0.0.1/24")]) });
        "delete of a used network" => Conflict, "", "used", |w| w.engine.network_delete(&w.admin, P, "karstbr0");
        "delete of a missing network" => NotFound, "", "nope", |w| w.engine.network_delete(&w.admin, P, "nope");
        "pool of an unknown kind" => Invalid, "driver", "drr", |w| w.engine.pool_create(&w.admin, CreatePool { name: "new".into(), driver: "drr".into(), ..Default::default() });
        "pool with an unknown key" => Invalid, "config.size", "size", |w| w.engine.pool_create(&w.admin, CreatePool { name: "new".into(), driver: "dir".into(), config: config(&[("size", "1GiB")]), ..Default::default() });
        "pool with no truth value" => Invalid, "config.volume.full_copy", "boolean", |w| w.engine.pool_create(&w.admin, CreatePool { name: "new".into(), driver: "dir".into(), config: config(&[("volume.full_copy", "some")]), ..Default::default() });
        "pool with a taken name" => Conflict, "name", "default", |w| w.engine.pool_create(&w.admin, CreatePool { name: P.into(), driver: "dir".into(), ..Default::default() });
        "definition of a pool with a taken name" => Conflict, "name", "default", |w| w.engine.pool_define(&w.admin, CreatePool { name: P.into(), driver: "dir".into(), ..Default::default() });
        "definition of a pool with a taken id" => Conflict, "id", "default", |w| { let id = w.engine.pool(&w.admin, "default").unwrap().id; w.engine.pool_define(&w.admin, CreatePool { name: "new".into(), driver: "dir".into(), id: Some(id), ..Default::default() }) };
        "start of an active pool" => Conflict, "", "active already", |w| w.engine.pool_change(&w.admin, "default", PoolChange::Start);
        "stop of a pool from which a guest runs" => Conflict, "", "stop it first", |w| w.engine.pool_change(&w.admin, "default", PoolChange::Stop);
        "what is in an active pool" => Conflict, "", "still active", |w| w.engine.pool_change(&w.admin, "default", PoolChange::Clear);
        "an active pool that is to be forgotten" => Conflict, "", "still active", |w| w.engine.pool_forget(&w.admin, "default");
        "autostart of a missing pool" => NotFound, "", "nope", |w| w.engine.pool_set_autostart(&w.admin, "nope", true);
        "delete of a used pool" => Conflict, "", "used", |w| w.engine.pool_delete(&w.admin, "default");
        "delete of a missing pool" => NotFound, "", "nope", |w| w.engine.pool_delete(&w.admin, "nope");
        "recovery of a pool of an unknown kind" => Invalid, "driver", "drr", |w| w.engine.recover_pool(&w.admin, &RecoverPool { name: "lost".into(), driver: "drr".into(), ..Default::default() });
        "recovery of a pool of which nothing is there" => NotFound, "config.source", "dir", |w| w.engine.recover_pool(&w.admin, &RecoverPool { name: "lost".into(), driver: "dir".into(), ..Default::default() });
        "recovery of a volume that is known or is not there" => NotFound, "", "described", |w| w.engine.recover_volume(&w.admin, "default", karst_model::VolumeId(uuid::Uuid::from_u128(9)));
        "recovery in a pool without a driver" => NotFound, "pools[0]", "nope", |w| w.engine.recover_import(&w.admin, &[RecoverPool { name: "nope".into(), ..Default::default() }]);
        // Images.
        "wrong fingerprint" => Invalid, "fingerprint", "64", |w| w.engine.image_build(&w.admin, P, "debian/13", InstanceKind::Container, ImageOptions { fingerprint: Some("abc".into()), ..Default::default() });
        "wrong alias" => Invalid, "aliases[0].name", "", |w| w.engine.image_build(&w.admin, P, "debian/13", InstanceKind::Container, ImageOptions { aliases: vec![("a\0".into(), String::new())], ..Default::default() });
        "wrong recipe" => Invalid, "recipe", "", |w| w.engine.image_build(&w.admin, P, "", InstanceKind::Container, ImageOptions::default());
        "image of nothing" => NotFound, "source.name", "nope", |w| w.engine.image_publish(&w.admin, P, PublishImage { name: "nope".into(), ..Default::default() });
        "image of a missing snapshot" => NotFound, "source.name", "nope", |w| w.engine.image_publish(&w.admin, P, PublishImage { name: "still".into(), snapshot: Some("nope".into()), ..Default::default() });
        "image of an instance in a missing project" => NotFound, "source.project", "nope", |w| w.engine.image_publish(&w.admin, P, PublishImage { project: Some("nope".into()), name: "still".into(), ..Default::default() });
        "image under an alias that is taken" => Conflict, "aliases", "debian/12", |w| w.engine.image_publish(&w.admin, P, PublishImage { name: "still".into(), options: ImageOptions { aliases: vec![("debian/12".into(), String::new())], ..Default::default() }, ..Default::default() });
        "move of a running one" => Conflict, "", "stop it", |w| w.engine.instance_move(&w.admin, P, "run", MoveInstance { pool: Some("second".into()), ..Default::default() });
        "copy of the disk of a container" => Unsupported, "", "container", |w| w.engine.disk_copy_begin(&w.admin, P, "run", disk_copy(None, CopyTarget::Pool("second".into())));
        "copy of the disk of a stopped machine" => Conflict, "", "not running", |w| w.engine.disk_copy_begin(&w.admin, P, "vm", disk_copy(None, CopyTarget::Pool("second".into())));
        "copy of the disk of nothing" => NotFound, "", "nope", |w| w.engine.disk_copy_begin(&w.admin, P, "nope", disk_copy(None, CopyTarget::Pool("second".into())));
        "save of a stopped machine" => Conflict, "", "not running", |w| w.engine.machine_save(&w.admin, P, "vm", save("/srv/saves/a"));
        "save of a container" => Unsupported, "", "container", |w| w.engine.machine_save(&w.admin, P, "run", save("/srv/saves/a"));
        "save through a way out" => Invalid, "path", "absolute", |w| w.engine.machine_save(&w.admin, P, "vm", save("/srv/saves/../a"));
        "save with too large a document" => TooLarge, "document", "bytes", |w| w.engine.machine_save(&w.admin, P, "vm", SaveMemory { document: "x".repeat(200 << 10), ..save("/srv/saves/a") });
        "restore from a path that is none" => Invalid, "path", "absolute", |w| w.engine.machine_restore(&w.admin, P, "vm", "a", false);
        "look into a file that is not granted" => Forbidden, "path", "save_paths", |w| w.engine.memory_file(&w.admin, "/etc/shadow");
        "abort of memory that is not written" => Conflict, "", "not being written", |w| w.engine.memory_writing_abort(&w.admin, P, "vm");
        "end of a copy that there is none of" => Conflict, "", "copied", |w| w.engine.disk_copy_end(&w.admin, P, "vm", "root", karst_model::guest::DiskCopyEnd::Cancel, true);
        "speed of a copy that there is none of" => Conflict, "", "copied", |w| w.engine.disk_copy_speed(&w.admin, P, "vm", "root", 1);
        "layer of a container" => Unsupported, "", "container", |w| w.engine.layers_create(&w.admin, P, "run", karst_engine::layers::create::CreateLayers::default());
        "layer of nothing" => NotFound, "", "nope", |w| w.engine.layers_create(&w.admin, P, "nope", karst_engine::layers::create::CreateLayers::default());
        "still layer of a stopped machine" => Conflict, "quiesce", "does not run", |w| w.engine.layers_create(&w.admin, P, "vm", karst_engine::layers::create::CreateLayers { quiesce: true, ..Default::default() });
        "layer with a snapshot of no name" => Invalid, "name", "", |w| w.engine.layers_create(&w.admin, P, "vm", karst_engine::layers::create::CreateLayers { snapshot: Some("a b".into()), ..Default::default() });
        "merge of layers of a container" => Unsupported, "", "container", |w| w.engine.layers_merge(&w.admin, P, "run", pull());
        "merge of layers of a stopped machine" => Conflict, "", "not running", |w| w.engine.layers_merge(&w.admin, P, "vm", pull());
        "checkpoint of a container" => Unsupported, "", "container", |w| w.engine.checkpoint_create(&w.admin, P, "run", CreateCheckpoint { name: "c".into(), ..Default::default() });
        "checkpoint of a stopped machine" => Conflict, "", "not running", |w| w.engine.checkpoint_create(&w.admin, P, "vm", CreateCheckpoint { name: "c".into(), ..Default::default() });
        "delete of a missing checkpoint" => NotFound, "", "nope", |w| w.engine.checkpoint_delete(&w.admin, P, "vm", "nope");
        "text of a missing checkpoint" => NotFound, "", "nope", |w| w.engine.checkpoint_describe(&w.admin, P, "vm", "nope", "x");
        "backup of the disks of a stopped machine" => Conflict, "", "not running", |w| w.engine.disk_backup_begin(&w.admin, P, "vm", BeginBackup { disks: vec![], checkpoint: None, listen: None, limit: None });
        "end of a backup that there is none of" => Conflict, "", "backed up", |w| w.engine.disk_backup_end(&w.admin, P, "vm");
        "move to nowhere" => Invalid, "pool", "there already", |w| w.engine.instance_move(&w.admin, P, "still", MoveInstance::default());
        "move to a missing pool" => NotFound, "pool", "nope", |w| w.engine.instance_move(&w.admin, P, "still", MoveInstance { pool: Some("nope".into()), ..Default::default() });
        "move to a missing project" => NotFound, "project", "nope", |w| w.engine.instance_move(&w.admin, P, "still", MoveInstance { project: Some("nope".into()), ..Default::default() });
        "move to a name that is taken" => Conflict, "name", "run", |w| w.engine.instance_move(&w.admin, P, "still", MoveInstance { name: Some("run".into()), ..Default::default() });
        "move with an unknown key" => Invalid, "config.limits.memroy", "limits.memory", |w| w.engine.instance_move(&w.admin, P, "still", MoveInstance { name: Some("moved".into()), config: config(&[("limits.memroy", "1GiB")]), ..Default::default() });
        "rebuild of a running one" => Conflict, "", "stop it", |w| w.engine.instance_rebuild(&w.admin, P, "run", InstanceSource::None);
        "rebuild of nothing" => NotFound, "", "nope", |w| w.engine.instance_rebuild(&w.admin, P, "nope", InstanceSource::None);
        "rebuild of an image of the other kind" => Invalid, "source.alias", "container", |w| w.engine.instance_rebuild(&w.admin, P, "vm", InstanceSource::Image("debian/12".into()));
        "rebuild of a missing image" => NotFound, "", "nope", |w| w.engine.instance_rebuild(&w.admin, P, "still", InstanceSource::Image("nope".into()));
        "rebuild of an image of a missing project" => NotFound, "source.project", "nope", |w| w.engine.instance_rebuild(&w.admin, P, "still", InstanceSource::ImageOf { project: "nope".into(), reference: "debian/12".into() });
        "alias that is taken" => Conflict, "name", "debian/12", |w| w.engine.image_alias_create(&w.admin, P, "debian/12", "", "debian/12");
        "alias of nothing" => NotFound, "target", "nope", |w| w.engine.image_alias_create(&w.admin, P, "new", "", "nope");
        "rename of a missing alias" => NotFound, "", "nope", |w| w.engine.image_alias_rename(&w.admin, P, "nope", "x");
        "image If-Match" => PreconditionFailed, "", "changed", |w| w.engine.image_update(&w.admin, P, "debian/12", UpdateImage { public: false, properties: Config::new(), profiles: vec![], auto_update: None, expires_at: None, if_version: Some(99) });
        "delete of a missing image" => NotFound, "", "nope", |w| w.engine.image_delete(&w.admin, P, "nope");
    }
}

async fn demand(w: &World, done: Result<karst_engine::LiveOperation>) {
    assert_eq!(w.ended(done.unwrap()).await.error, None);
}

/// Everything that is stored but what says who writes.
async fn raw(w: &World) -> Vec<(String, Vec<u8>)> {
    let (kvs, _) = list_prefix(&*w.store, "/").await.unwrap();
    let of = kvs.into_iter().filter(|kv| !kv.key.starts_with("/karst/requests/"));
    of.map(|kv| (kv.key, kv.value.to_vec())).collect()
}

#[test]
fn wrong_input_is_refused_by_field_and_changes_nothing() {
    SeededEnv::run(21, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        demand(&w, e.image_build(c, P, "debian/12", InstanceKind::Container, ImageOptions::default()).await)
            .await;
        demand(
            &w,
            e.network_create(
                c,
                P,
                CreateNetwork { name: "net1".into(), ..network(&[("ipv4.address", "10.20.30.1/24")]) },
            )
            .await
            .map(|x| x.1),
        )
        .await;
        demand(
            &w,
            e.pool_create(
                c,
                CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() },
            )
            .await,
        )
        .await;
        e.project_create(c, "other", "", Config::new()).await.unwrap();
        e.profile_create(c, "other", "something", UpdateProfile::default()).await.unwrap();
        e.profile_create(c, P, "used", UpdateProfile::default()).await.unwrap();
        let used =
            CreateInstance { profiles: Some(vec!["default".into(), "used".into()]), ..container("still") };
        for request in [
            CreateInstance { start: true, ..container("run") },
            CreateInstance { kind: InstanceKind::VirtualMachine, ..container("vm") },
            used,
        ] {
            demand(&w, e.instance_create(c, P, request).await.map(|x| x.1)).await;
        }
        let gone = CreateInstance { vmid: Some(Vmid(4000)), ..container("gone") };
        demand(&w, e.instance_create(c, P, gone).await.map(|x| x.1)).await;
        demand(&w, e.instance_delete(c, P, "gone").await).await;
        w.settle().await;
        let (before, shown) = (raw(&w).await, w.fingerprint());
        let mut wrong = vec![];
        for case in cases() {
            let what = case.what;
            let mut complain = |text: String| wrong.push(format!("{what}: {text}"));
            match (case.call)(&w).await {
                Ok(()) => complain("was accepted".into()),
                Err(error) => {
                    let Error { kind, field, message, .. } = &error;
                    if *kind != case.kind {
                        complain(format!("is {kind:?}, not {:?}: {error:?}", case.kind));
                    }
                    if !case.field.is_empty() && field.as_deref() != Some(case.field) {
                        complain(format!("names {field:?}, not {:?}: {message}", case.field));
                    }
                    if !message.contains(case.says) {
                        complain(format!("does not say {:?}: {message}", case.says));
                    }
                    if message.contains('\n') || message.contains('\0') || message.len() > 2000 {
                        complain(format!("the message is not one short line: {message:.200}"));
                    }
                }
            }
            if raw(&w).await != before {
                complain("changed the store".into());
                break;
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert_eq!(w.fingerprint(), shown);
        let faults = w.faults().await;
        assert!(faults.is_empty(), "{faults:?}");
    });
}
