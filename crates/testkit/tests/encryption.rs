//! Encrypted volumes and disks: passphrases come from the secrets of the project when a host needs them, are in no record, and what is
//! missing is named.

use karst_engine::{
    LiveOperation,
    checkpoints::CreateCheckpoint,
    compute::{
        create::CreateInstance,
        disk_copy::{CopyDisk, CopyTarget},
        power::PowerRequest,
        update::UpdateInstance,
    },
    images::publish::PublishImage,
    layers::create::CreateLayers,
    secrets::{DefineSecret, SecretKey, SecretValue},
    volumes::{copy::CopyVolume, create::CreateVolume, update::UpdateVolume},
};
use karst_env::SeededEnv;
use karst_model::{
    Config, Error, ErrorKind, Result,
    device::Devices,
    encryption::Encryption,
    instance::{InstanceKind, PowerAction, Status},
    secret::SecretUse,
    storage::VolumeContent,
};
use karst_store::{ROOT, list_prefix};
use karst_testkit::{World, scenarios::container};
use uuid::Uuid;

const P: &str = "default";
const WORDS: &str = "open sesame, says Ali";

async fn done(w: &World, operation: Result<LiveOperation>) {
    assert_eq!(w.ended(operation.unwrap()).await.error, None);
}

async fn refused(w: &World, operation: Result<LiveOperation>) -> Error {
    match operation {
        Err(e) => e,
        Ok(operation) => w.ended(operation).await.error.clone().expect("it fails"),
    }
}

fn secret(n: u128) -> String {
    Uuid::from_u128(n).to_string()
}

async fn define(w: &World, n: u128, value: Option<&str>) {
    let new = DefineSecret {
        uuid: Some(Uuid::from_u128(n)),
        description: String::new(),
        kind: SecretUse::Volume,
        usage: format!("/volumes/{n}"),
        // Private: nobody is told the value, and a host gets it all the same.
        private: true,
        ephemeral: false,
    };
    w.engine.secret_define(&w.admin, P, new).await.unwrap();
    if let Some(value) = value {
        let value = SecretValue::new(value.as_bytes().to_vec()).unwrap();
        w.engine.secret_set_value(&w.admin, P, Uuid::from_u128(n), value).await.unwrap();
    }
}

fn keys(all: &[(&str, &str)]) -> Config {
    all.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn new_volume(name: &str, config: Config) -> CreateVolume {
    CreateVolume { name: name.into(), content: VolumeContent::Block, description: String::new(), config }
}

async fn volume(w: &World, name: &str, config: Config) -> Result<LiveOperation> {
    w.engine.volume_create(&w.admin, P, P, new_volume(name, config)).await
}

async fn ready(env: &SeededEnv) -> World {
    let w = World::new(env).await.unwrap();
    w.engine.set_secret_key(SecretKey::new(&[7; 32]).unwrap());
    w
}

fn drive(volume: &str, more: &[(&str, &str)]) -> Config {
    let mut keys = keys(&[("type", "disk"), ("pool", P), ("source", volume)]);
    keys.extend(more.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    keys
}

async fn update(w: &World, devices: Devices) -> Result<LiveOperation> {
    let update = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: Config::new(),
        devices,
        profiles: vec!["default".into()],
        if_version: None,
    };
    w.engine.instance_update(&w.admin, P, "m", update).await
}

async fn power(w: &World, action: PowerAction) -> Result<LiveOperation> {
    let request = PowerRequest { action, force: true, timeout: None, stateful: false };
    w.engine.instance_power(&w.admin, P, "m", request).await
}

/// Nothing that is written has the passphrase, and the host holds none.
async fn nothing_is_left(w: &World) {
    let (all, _) = list_prefix(w.engine.inner().db.store(), ROOT).await.unwrap();
    let found = all.iter().find(|kv| String::from_utf8_lossy(&kv.value).contains("sesame"));
    assert!(found.is_none(), "{:?}", found.map(|kv| &kv.key));
    assert!(w.agent.held_keys().is_empty());
}

#[test]
fn volumes_are_encrypted_with_a_secret_of_their_project() {
    SeededEnv::run(1, |env| async move {
        let w = ready(&env).await;
        let of = |n: u128| keys(&[("size", "1GiB"), ("encryption.secret", &secret(n))]);
        // Without the secret, without its value, and with one that is no passphrase.
        let e = refused(&w, volume(&w, "v1", of(1)).await).await;
        assert!(e.is(ErrorKind::NotFound) && e.message.contains(&secret(1)), "{e}");
        assert_eq!(e.field.as_deref(), Some("config.encryption.secret"));
        define(&w, 1, None).await;
        let e = refused(&w, volume(&w, "v1", of(1)).await).await;
        assert!(e.message.contains("does not have a value"), "{e}");
        define(&w, 2, Some("a\0b")).await;
        let e = refused(&w, volume(&w, "v1", of(2)).await).await;
        assert!(e.is(ErrorKind::Invalid) && e.message.contains("NUL"), "{e}");
        assert!(w.engine.custom_volume(&w.admin, P, P, "v1").is_err(), "nothing was made");

        define(&w, 1, Some(WORDS)).await;
        done(&w, volume(&w, "v1", of(1)).await).await;
        nothing_is_left(&w).await;
        let made = w.engine.custom_volume(&w.admin, P, P, "v1").unwrap();
        let header = Encryption::default().header();
        assert_eq!(made.size.unwrap().bytes(), 1 << 30, "what machines see");
        assert_eq!(made.stored_size().unwrap().bytes(), (1 << 30) + header);

        // What it is made with stays; it grows, and another secret may open it.
        let change = async |config: Config| {
            let request = UpdateVolume { description: String::new(), config, if_version: None };
            w.engine.volume_update(&w.admin, P, P, "v1", request).await
        };
        let e = refused(&w, change(keys(&[("size", "1GiB")])).await).await;
        assert_eq!(e.field.as_deref(), Some("config.encryption.secret"));
        let mut other = of(1);
        other.insert("encryption.cipher".into(), "aes-128-xts".into());
        let e = refused(&w, change(other).await).await;
        assert_eq!(e.field.as_deref(), Some("config.encryption.cipher"));
        let mut larger = of(2);
        larger.insert("size".into(), "2GiB".into());
        done(&w, change(larger).await).await;
        assert_eq!(w.engine.custom_volume(&w.admin, P, P, "v1").unwrap().size.unwrap().bytes(), 2 << 30);

        // A copy is the same container, and what is not encrypted does not become so.
        let copy = async |from: &str, to: &str, config: Config, refresh: bool| {
            let request = CopyVolume {
                project: P.into(),
                pool: P.into(),
                name: from.into(),
                snapshot: None,
                volume_only: true,
                refresh,
                exclude_older: false,
                copy: new_volume(to, config),
            };
            w.engine.volume_copy(&w.admin, P, P, request).await
        };
        done(&w, copy("v1", "v2", Config::new(), false).await).await;
        let made = w.engine.custom_volume(&w.admin, P, P, "v2").unwrap();
        assert_eq!(made.encryption().map(|(s, _)| s), Some(Uuid::from_u128(2)));
        done(&w, volume(&w, "plain", keys(&[("size", "1GiB")])).await).await;
        let e =
            refused(&w, copy("plain", "v3", keys(&[("encryption.secret", &secret(1))]), false).await).await;
        assert_eq!(e.field.as_deref(), Some("config.encryption.secret"));

        // A refresh brings the whole container, which the secret of the original opens.
        let with = |n: u128| {
            let mut config = of(n);
            config.insert("size".into(), "2GiB".into());
            config
        };
        done(&w, change(with(1)).await).await;
        let e = refused(&w, copy("v1", "v2", Config::new(), true).await).await;
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("encryption.secret"), "{e}");
        assert_eq!(e.field.as_deref(), Some("source.name"));
        done(&w, change(with(2)).await).await;
        done(&w, copy("v1", "v2", Config::new(), true).await).await;
        assert_eq!(w.faults().await, Vec::<String>::new());
    });
}

#[test]
fn machines_open_their_disks_with_secrets_and_say_which_is_missing() {
    SeededEnv::run(2, |env| async move {
        let w = ready(&env).await;
        for (n, name) in [(1, "v1"), (2, "v2")] {
            define(&w, n, Some(WORDS)).await;
            let config = keys(&[("size", "1GiB"), ("encryption.secret", &secret(n))]);
            done(&w, volume(&w, name, config).await).await;
        }
        let one = Devices::from([("data".into(), drive("v1", &[]))]);
        let create = CreateInstance {
            kind: InstanceKind::VirtualMachine,
            start: true,
            devices: one.clone(),
            ..container("m")
        };
        done(&w, w.engine.instance_create(&w.admin, P, create).await.map(|(_, o)| o)).await;
        nothing_is_left(&w).await;

        // One comes while it runs, and one that a device says is opened by another secret.
        let mut two = one.clone();
        two.insert("more".into(), drive("v2", &[("encryption.secret", &secret(1))]));
        done(&w, update(&w, two.clone()).await).await;
        nothing_is_left(&w).await;

        // What QEMU would decrypt is not written elsewhere.
        let device = Some("data".to_owned());
        let to = CopyTarget::Volume { pool: P.into(), name: "v9".into(), new: true };
        let request = CopyDisk { device, to, hold: true, speed: 0, synchronous: false };
        let e = refused(&w, w.engine.disk_copy_begin(&w.admin, P, "m", request).await).await;
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("encrypted"), "{e}");
        let all = CreateCheckpoint { name: "c1".into(), ..Default::default() };
        let e = refused(&w, w.engine.checkpoint_create(&w.admin, P, "m", all).await).await;
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("encrypted"), "{e}");

        let e = refused(&w, w.engine.layers_create(&w.admin, P, "m", CreateLayers::default()).await).await;
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("encrypted"), "{e}");
        assert_eq!(e.field.as_deref(), Some("disks.data"));

        // A secret that is gone keeps nobody from changing what runs, but a start fails, and says what is missing.
        w.engine.secret_undefine(&w.admin, P, Uuid::from_u128(1)).await.unwrap();
        let mut slow = two.clone();
        slow.get_mut("data").unwrap().insert("limits.read".into(), "1MiB".into());
        done(&w, update(&w, slow).await).await;
        done(&w, power(&w, PowerAction::Stop).await).await;
        let e = refused(&w, power(&w, PowerAction::Start).await).await;
        assert!(e.message.contains(&secret(1)) && e.message.contains("define it"), "{e}");
        assert_eq!(e.field.as_deref(), Some("devices.data.encryption.secret"));
        assert_eq!(w.engine.instance(&w.admin, P, "m").unwrap().status, Status::Stopped);
        define(&w, 1, Some(WORDS)).await;
        done(&w, power(&w, PowerAction::Start).await).await;
        nothing_is_left(&w).await;
        assert_eq!(w.faults().await, Vec::<String>::new());
    });
}

#[test]
fn an_encrypted_root_is_started_and_is_taken_for_nobody_elses() {
    SeededEnv::run(4, |env| async move {
        let w = ready(&env).await;
        define(&w, 1, Some(WORDS)).await;
        let config = keys(&[("size", "1GiB"), ("encryption.secret", &secret(1))]);
        done(&w, volume(&w, "v1", config).await).await;
        let create = CreateInstance {
            kind: InstanceKind::VirtualMachine,
            start: true,
            devices: Devices::from([("root".into(), drive("v1", &[("path", "/")]))]),
            ..container("m")
        };
        done(&w, w.engine.instance_create(&w.admin, P, create).await.map(|(_, o)| o)).await;
        nothing_is_left(&w).await;
        done(&w, power(&w, PowerAction::Stop).await).await;
        let publish = PublishImage { name: "m".into(), ..Default::default() };
        let e = refused(&w, w.engine.image_publish(&w.admin, P, publish).await).await;
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("encrypted volume"), "{e}");
        w.engine.secret_undefine(&w.admin, P, Uuid::from_u128(1)).await.unwrap();
        let e = refused(&w, power(&w, PowerAction::Start).await).await;
        assert_eq!(e.field.as_deref(), Some("devices.root.encryption.secret"));
    });
}

#[test]
fn keys_of_disks_are_checked() {
    SeededEnv::run(3, |env| async move {
        let w = ready(&env).await;
        done(&w, volume(&w, "v1", keys(&[("size", "1GiB")])).await).await;
        for (content, config, field) in [
            (
                VolumeContent::Filesystem,
                keys(&[("encryption.secret", &secret(1))]),
                "config.encryption.secret",
            ),
            (VolumeContent::Block, keys(&[("encryption.secret", "mine")]), "config.encryption.secret"),
            (VolumeContent::Block, keys(&[("encryption.iv", "plain64")]), "config.encryption.iv"),
        ] {
            let request = CreateVolume { content, ..new_volume("v2", config) };
            let e = w.engine.volume_create(&w.admin, P, P, request).await.map(drop).unwrap_err();
            assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some(field), "{e}");
        }
        let machine = |device: Config| CreateInstance {
            kind: InstanceKind::VirtualMachine,
            devices: Devices::from([("data".into(), device)]),
            ..container("m")
        };
        let host = |more: &[(&str, &str)]| {
            let mut all =
                keys(&[("type", "disk"), ("source", "/srv/a.img"), ("encryption.secret", &secret(1))]);
            all.extend(keys(more));
            all
        };
        for (device, key) in [
            (drive("v1", &[("encryption.secret", "mine")]), "encryption.secret"),
            (host(&[("path", "/mnt")]), "encryption.secret"),
            (host(&[("format", "qcow2")]), "format"),
        ] {
            let e = w.engine.instance_create(&w.admin, P, machine(device)).await.map(drop).unwrap_err();
            let field = format!("devices.data.{key}");
            assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some(field.as_str()), "{e}");
        }
    });
}
