-- Ganeti's own tests of the metadata daemon alone, without the 180 modules of its test program.
import Test.Framework (defaultMain)
import Test.Ganeti.Metad.Config (testMetad_Config)

main :: IO ()
main = defaultMain [testMetad_Config]
